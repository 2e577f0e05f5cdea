"""What each type of item is to the engine: the one table that tells them apart."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from blipq_worker.blip2 import (
    Arrays,
    EmbedItem,
    GeneratedText,
    GenerateItem,
    MatchItem,
    RankItem,
    RerankItem,
)
from blipq_worker.seam import requests
from blipq_worker.seam.requests import (
    Array,
    Embedded,
    Generated,
    Matched,
    Ranked,
    Reranked,
    Value,
)


@dataclass(frozen=True, slots=True)
class Verb:
    """How items of a type are run.

    name: the method of ``Blip2`` that runs them. value: what its answers become. setting: what
    items of one batch must share, beside model and type; None for items that join a session or
    batch with any other. cost: what an item takes of a batch's room for beams.
    """

    name: str
    value: Callable[[Any], Value]
    setting: Callable[[Any], Hashable] = lambda item: None
    cost: Callable[[Any], int] = lambda item: 1


def _generated(texts: Sequence[Sequence[GeneratedText]]) -> Generated:
    return Generated(
        tuple(
            tuple(requests.GeneratedText(each.text, each.tokens) for each in alternatives)
            for alternatives in texts
        )
    )


def _embedded(arrays: Arrays) -> Embedded:
    return Embedded(
        {
            name: Array(values.shape, np.ascontiguousarray(values, dtype="<f4").tobytes())
            for name, values in arrays.items()
        }
    )


#: In a session each sequence has its own parameters; beams that run together share theirs.
GENERATE = Verb(
    "generate",
    value=_generated,
    setting=lambda item: None if item.params.in_flight else item.params,
    cost=lambda item: len(item.prompts) * item.params.num_beams,
)

VERBS: Mapping[type, Verb] = {
    GenerateItem: GENERATE,
    RankItem: Verb("rank", value=lambda rows: Ranked(tuple(map(tuple, rows)))),
    MatchItem: Verb(
        "match", value=lambda scores: Matched(tuple(scores)), setting=lambda item: item.head
    ),
    RerankItem: Verb("rerank", value=lambda scores: Reranked(*scores)),
    EmbedItem: Verb("embed", value=_embedded),
}
