"""How well texts match an image: the matching head (itm) and the contrastive one (itc).

Source: lavis/models/blip2_models/blip2_image_text_matching.py. The parts are called one by one
rather than through transformers' own forward, which drops the first 32 ids of a text-only input and
takes one text per image.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.nn.functional import normalize

from blipq_worker.blip2.checkpoints import Checkpoint, CheckpointError
from blipq_worker.blip2.features import (
    image_features,
    pair_features,
    query_features,
    text_features,
)
from blipq_worker.blip2.preprocessing import Pixels
from blipq_worker.blip2.texts import Texts

Head = Literal["itm", "itc"]

_MAX_TEXT_TOKENS = 32  # LAVIS's max_txt_len
# Each pair holds its own copy of the image's features (1.4 MB in fp32 for ViT-g at 224 pixels).
_PAIRS_AT_ONCE = 128


@dataclass(frozen=True, slots=True, eq=False)
class MatchItem:
    """One image and the texts to score against it, as the caller wrote them."""

    pixels: Pixels
    texts: tuple[str, ...]
    head: Head = "itm"


@dataclass(frozen=True, slots=True, eq=False)
class RerankItem:
    """An image that is near a text, to be looked at together with it."""

    pixels: Pixels
    text: str


class Matcher:
    """Runs a retrieval checkpoint. Not thread-safe."""

    def __init__(self, checkpoint: Checkpoint, model: Any, tokenizer: Any) -> None:
        if checkpoint.family != "retrieval":
            raise CheckpointError(
                f"{checkpoint.name!r} is not a retrieval checkpoint (Blip2ForImageTextRetrieval)"
            )
        if not checkpoint.config.qformer_config.use_qformer_text_input:
            raise CheckpointError(
                f"the configuration of {checkpoint.name!r} predates use_qformer_text_input: take a "
                "later revision"
            )
        self.model = model
        self.texts = Texts(checkpoint, tokenizer, longest=_MAX_TEXT_TOKENS)
        #: Called after each chunk of pairs: a long batch is not a hung one.
        self.on_step: Callable[[], None] = lambda: None

    @torch.inference_mode()
    def match(self, items: Sequence[MatchItem]) -> list[list[float]]:
        """A score per text: the probability of a match (itm) or a cosine in [-1, 1] (itc).

        One pass of the vision tower per image. Neighbours do not change a score beyond rounding.
        """
        if not items:
            return []
        images = image_features(self.model, [_pixels(item) for item in items])
        scores: list[list[float]] = [[] for _ in items]
        for head, score in (("itm", self._itm), ("itc", self._itc)):
            owners = [i for i, item in enumerate(items) if item.head == head for _ in item.texts]
            texts = [text for item in items if item.head == head for text in item.texts]
            for start in range(0, len(texts), _PAIRS_AT_ONCE):
                chunk = slice(start, start + _PAIRS_AT_ONCE)
                found = score(images, owners[chunk], texts[chunk])
                self.on_step()
                for owner, value in zip(owners[chunk], found.tolist(), strict=True):
                    scores[owner].append(value)
        return scores

    @torch.inference_mode()
    def rerank(self, items: Sequence[RerankItem]) -> list[tuple[float, float]]:
        """The matching logit, by which LAVIS ranks, and the probability of a match, per item."""
        images = image_features(self.model, [_pixels(item) for item in items])
        logits = self._itm_logits(images, range(len(items)), [item.text for item in items])
        probabilities = logits.softmax(dim=-1)
        return list(zip(logits[:, 1].tolist(), probabilities[:, 1].tolist(), strict=True))

    def _itm(
        self, images: torch.Tensor, owners: Sequence[int], texts: Sequence[str]
    ) -> torch.Tensor:
        """Match probabilities, (pairs,)."""
        return self._itm_logits(images, owners, texts).softmax(dim=-1)[:, 1]

    def _itm_logits(
        self, images: torch.Tensor, owners: Sequence[int], texts: Sequence[str]
    ) -> torch.Tensor:
        """No match and match, (pairs, 2): the queries read the text and the image together."""
        ids, mask = self.texts.padded(texts, images.device)
        read = pair_features(self.model, images[list(owners)], ids, mask)
        logits: torch.Tensor = self.model.itm_head(read).mean(dim=1)
        return logits

    def _itc(
        self, images: torch.Tensor, owners: Sequence[int], texts: Sequence[str]
    ) -> torch.Tensor:
        """Cosines, (pairs,): the best of an image's 32 queries against the text."""
        distinct = sorted(set(owners))
        image = query_features(self.model, images[distinct])
        image = normalize(self.model.vision_projection(image), dim=-1)
        ids, mask = self.texts.padded(texts, images.device)
        read = text_features(self.model, ids, mask)
        text = normalize(self.model.text_projection(read[:, 0]), dim=-1)
        own = image[[distinct.index(owner) for owner in owners]]
        return torch.einsum("pqd,pd->pq", own, text).amax(dim=-1)


def _pixels(item: MatchItem | RerankItem) -> torch.Tensor:
    if item.pixels.retrieval is None:
        raise ValueError("these pixels were prepared without a retrieval checkpoint")
    return item.pixels.retrieval
