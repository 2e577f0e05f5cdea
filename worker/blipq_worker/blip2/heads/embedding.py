"""Features of images and texts, as LAVIS's ``extract_features`` defines them.

Source: lavis/models/blip2_models/blip2_qformer.py. Shapes are those of the published checkpoints.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch.nn.functional import normalize

from blipq.contract import ErrorCode
from blipq.errors import PermanentError
from blipq_worker.blip2.loading.checkpoints import Checkpoint
from blipq_worker.blip2.text.tokens import Texts
from blipq_worker.blip2.vision.features import Vision, pair_features, text_features
from blipq_worker.blip2.vision.preprocessing import Pixels

Mode = Literal["image", "text", "multimodal"]
Arrays = dict[str, "np.ndarray[Any, np.dtype[np.float32]]"]


@dataclass(frozen=True, slots=True, eq=False)
class EmbedItem:
    """What to embed: an image (``image``), a text (``text``), or both read together."""

    mode: Mode
    pixels: Pixels | None = None
    text: str | None = None


class Embedder:
    """Runs a retrieval checkpoint for its features. Not thread-safe, except for ``check``."""

    def __init__(self, checkpoint: Checkpoint, model: Any, tokenizer: Any, vision: Vision) -> None:
        self.model = model
        self._vision = vision
        self._texts = Texts(checkpoint, tokenizer, longest=None)
        #: Called after each pass, of which a batch may need three.
        self.on_step: Callable[[], None] = lambda: None
        self._positions: int = checkpoint.config.qformer_config.max_position_embeddings

    def check(self, item: EmbedItem) -> None:
        """Raises PermanentError ``invalid_request`` for a text that is too long. Thread-safe."""
        count = len(self._texts.ids(item.text or ""))
        if count > self._positions:
            message = f"a text has {count:,} tokens, where this model reads {self._positions:,}"
            raise PermanentError(ErrorCode.INVALID_REQUEST, message)

    def write_tokenizer(self, path: Path) -> None:
        """Writes what makes ids of texts to a file of the library tokenizers. Raises OSError."""
        self._texts.write(path)

    @torch.inference_mode()
    def embed(self, items: Sequence[EmbedItem]) -> list[Arrays]:
        """Features by name, fp32, per item.

        image: ``image_embeds`` (32, 768) and ``image_embeds_proj`` (32, 256), each row of length 1.
        text: ``text_embeds`` (tokens, 768) and ``text_embeds_proj`` (tokens, 256), each row of
        length 1; row 0 stands for the text. multimodal: ``multimodal_embeds`` (32, 768).
        """
        found: dict[int, Arrays] = {}
        for mode in get_args(Mode):
            chosen = {index: item for index, item in enumerate(items) if item.mode == mode}
            if chosen:
                answers = getattr(self, f"_{mode}")(list(chosen.values()))
                self.on_step()
                found.update(zip(chosen, answers, strict=True))
        return [found[index] for index in range(len(items))]

    def _image(self, items: Sequence[EmbedItem]) -> list[Arrays]:
        queries = self._vision.queries(_images(items))
        projected = normalize(self.model.vision_projection(queries), dim=-1)
        return [
            {"image_embeds": _array(each), "image_embeds_proj": _array(proj)}
            for each, proj in zip(queries, projected, strict=True)
        ]

    def _text(self, items: Sequence[EmbedItem]) -> list[Arrays]:
        ids, mask = self._padded(items)
        read = text_features(self.model, ids, mask)
        projected = normalize(self.model.text_projection(read), dim=-1)
        counts = mask.sum(dim=1).tolist()
        return [
            {"text_embeds": _array(each[:count]), "text_embeds_proj": _array(proj[:count])}
            for each, proj, count in zip(read, projected, counts, strict=True)
        ]

    def _multimodal(self, items: Sequence[EmbedItem]) -> list[Arrays]:
        read = pair_features(self.model, self._vision.patches(_images(items)), *self._padded(items))
        return [{"multimodal_embeds": _array(each)} for each in read]

    def _padded(self, items: Sequence[EmbedItem]) -> tuple[torch.Tensor, torch.Tensor]:
        texts = [item.text or "" for item in items]
        return self._texts.padded(texts, self.model.query_tokens.device)


def _images(items: Sequence[EmbedItem]) -> list[Pixels]:
    images = [item.pixels for item in items if item.pixels is not None]
    if len(images) < len(items):
        raise ValueError("an image to embed is missing")
    return images


def _array(features: torch.Tensor) -> "np.ndarray[Any, np.dtype[np.float32]]":
    return features.float().cpu().numpy()
