"""What each type of item is to the engine: the one table that distinguishes them."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from blipq_worker.blip2 import (
    Arrays,
    EmbedItem,
    ExplainItem,
    GeneratedText,
    GenerateItem,
    MatchItem,
    Pixels,
    RankItem,
    RerankItem,
)
from blipq_worker.blip2 import Item as ModelItem
from blipq_worker.inference import requests
from blipq_worker.inference.requests import (
    Array,
    Embed,
    Embedded,
    Explain,
    Feature,
    Generate,
    Generated,
    Item,
    Match,
    Matched,
    Rank,
    Ranked,
    Rerank,
    Reranked,
    Value,
)


@dataclass(frozen=True, slots=True)
class Verb:
    """How items of a type are run.

    name: the method of ``Blip2`` that runs them. item: an item as that method takes it. value: what
    its answers become. feature: what an item needs of its image. setting: what items of one batch
    must share, beside model and type. cost: an item's part of what a pass takes, in rows. repeats:
    whether equal items come to the same.
    """

    name: str
    item: Callable[[Any, Any], ModelItem]
    value: Callable[[Any], Value]
    feature: Callable[[Any], Feature]
    setting: Callable[[Any], Hashable] = lambda item: None
    cost: Callable[[Any], int] = lambda item: 1
    repeats: Callable[[Any], bool] = lambda item: True


def _generated(texts: Sequence[Sequence[GeneratedText]]) -> Generated:
    return Generated(tuple(tuple(map(_text, alternatives)) for alternatives in texts))


def _text(text: GeneratedText) -> requests.GeneratedText:
    # Field by field: dataclasses.astuple copies each token's logarithm, too.
    return requests.GeneratedText(
        text.text,
        text.tokens,
        text.log_likelihood,
        text.mean_token_probability,
        text.finish_reason,
        text.rewritten,
        text.logprobs,
    )


def _embedded(arrays: Arrays) -> Embedded:
    return Embedded(
        {
            name: Array(values.shape, np.ascontiguousarray(values, dtype="<f4").tobytes())
            for name, values in arrays.items()
        }
    )


GENERATE = Verb(
    "generate",
    item=lambda item, pixels: GenerateItem(pixels, item.prompts, item.params),
    value=_generated,
    feature=lambda item: "generation",
    cost=lambda item: len(item.prompts) * item.params.num_beams,
    repeats=lambda item: not item.params.do_sample or item.params.seed is not None,
)

_VERBS: Mapping[type, Verb] = {
    Generate: GENERATE,
    Rank: Verb(
        "rank",
        item=lambda item, pixels: RankItem(pixels, item.prompts, item.choices),
        value=lambda rows: Ranked(tuple(map(tuple, rows))),
        feature=lambda item: "generation",
    ),
    Match: Verb(
        "match",
        item=lambda item, pixels: MatchItem(pixels, item.texts, item.head),
        value=lambda scores: Matched(tuple(scores)),
        feature=lambda item: "patches" if item.head == "itm" else "retrieval",
        setting=lambda item: item.head,
    ),
    Explain: Verb(
        "explain",
        item=lambda item, pixels: ExplainItem(pixels, item.texts),
        value=_embedded,
        feature=lambda item: "patches",
        # An image takes long, and neighbours make it no shorter: what is urgent runs between two.
        setting=lambda item: (item.image.digest or id(item.image), item.texts),
    ),
    Rerank: Verb(
        "rerank",
        item=lambda item, pixels: RerankItem(pixels, item.text),
        value=lambda scores: Reranked(*scores),
        feature=lambda item: "patches",
    ),
    Embed: Verb(
        "embed",
        item=lambda item, pixels: EmbedItem(item.mode, pixels, item.text),
        value=_embedded,
        feature=lambda item: "retrieval" if item.mode == "image" else "patches",
    ),
}


def verb_of(item: Item) -> Verb:
    """How an item is run."""
    return _VERBS[type(item)]


def as_model_item(item: Item, pixels: Pixels | None = None) -> ModelItem:
    """An item as the model takes it; without pixels it can be checked, and not run."""
    return verb_of(item).item(item, pixels)
