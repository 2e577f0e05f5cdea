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

from blipq_worker.blip2.loading.checkpoints import Checkpoint, CheckpointError
from blipq_worker.blip2.text.tokens import Texts
from blipq_worker.blip2.vision.features import Vision, pair_features, text_features
from blipq_worker.blip2.vision.preprocessing import Pixels

Head = Literal["itm", "itc"]

_MAX_TEXT_TOKENS = 32  # LAVIS's max_txt_len
# Each pair holds its own copy of the image's features (1.4 MB in fp32 for ViT-g at 224 pixels). A
# CPU needs most of a minute for as many pairs, in which the pass would report no progress.
_PAIRS_AT_ONCE = 128
_PAIRS_AT_ONCE_ON_A_CPU = 16


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

    def __init__(self, checkpoint: Checkpoint, model: Any, tokenizer: Any, vision: Vision) -> None:
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
        self.vision = vision
        self.texts = Texts(checkpoint, tokenizer, longest=_MAX_TEXT_TOKENS)
        #: Called after each chunk of pairs: a long batch is not a hung one.
        self.on_step: Callable[[], None] = lambda: None

    @torch.inference_mode()
    def match(self, items: Sequence[MatchItem]) -> list[list[float]]:
        """A score per text: the probability of a match (itm) or a cosine in [-1, 1] (itc).

        One pass of the vision tower per image. Neighbours do not change a score beyond rounding.
        """
        scores: list[list[float]] = [[] for _ in items]
        on_a_cpu = self.model.query_tokens.device.type == "cpu"
        at_once = _PAIRS_AT_ONCE_ON_A_CPU if on_a_cpu else _PAIRS_AT_ONCE
        for head, see, score in (
            ("itm", self.vision.patches, self._itm),
            ("itc", self.vision.queries, self._itc),
        ):
            chosen = [index for index, item in enumerate(items) if item.head == head]
            pairs = [(index, text) for index in chosen for text in items[index].texts]
            if not pairs:
                continue
            images = see([items[index].pixels for index in chosen])
            for start in range(0, len(pairs), at_once):
                chunk = pairs[start : start + at_once]
                own = images[[chosen.index(index) for index, _ in chunk]]
                found = score(own, [text for _, text in chunk]).tolist()
                self.on_step()
                for (index, _), value in zip(chunk, found, strict=True):
                    scores[index].append(value)
        return scores

    @torch.inference_mode()
    def rerank(self, items: Sequence[RerankItem]) -> list[tuple[float, float]]:
        """The matching logit, by which LAVIS ranks, and the probability of a match, per item."""
        images = self.vision.patches([item.pixels for item in items])
        logits = self._itm_logits(images, [item.text for item in items])
        self.on_step()
        probabilities = logits.softmax(dim=-1)
        return list(zip(logits[:, 1].tolist(), probabilities[:, 1].tolist(), strict=True))

    def _itm(self, images: torch.Tensor, texts: Sequence[str]) -> torch.Tensor:
        """Match probabilities, (pairs,)."""
        return self._itm_logits(images, texts).softmax(dim=-1)[:, 1]

    def _itm_logits(self, images: torch.Tensor, texts: Sequence[str]) -> torch.Tensor:
        """No match and match, (pairs, 2): the queries read the text and the image together."""
        ids, mask = self.texts.padded(texts, images.device)
        read = pair_features(self.model, images, ids, mask)
        logits: torch.Tensor = self.model.itm_head(read).mean(dim=1)
        return logits

    def _itc(self, queries: torch.Tensor, texts: Sequence[str]) -> torch.Tensor:
        """Cosines, (pairs,): the best of an image's 32 queries against the text."""
        image = normalize(self.model.vision_projection(queries), dim=-1)
        ids, mask = self.texts.padded(texts, queries.device)
        read = text_features(self.model, ids, mask)
        text = normalize(self.model.text_projection(read[:, 0]), dim=-1)
        return torch.einsum("pqd,pd->pq", image, text).amax(dim=-1)
