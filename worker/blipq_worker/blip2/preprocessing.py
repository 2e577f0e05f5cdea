"""A decoded image to the pixels that a vision tower takes."""

from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

from blipq_worker.blip2.checkpoints import Checkpoint, CheckpointError


@dataclass(frozen=True, slots=True, eq=False)
class Pixels:
    """One image as float32 tensors of shape (3, S, S), on the CPU.

    ``retrieval`` is None without a retrieval checkpoint, and the same tensor as ``generation``
    where both checkpoints preprocess alike.
    """

    generation: torch.Tensor
    retrieval: torch.Tensor | None = None


class Preprocessor:
    """LAVIS's ``blip_image_eval``: squash to S x S (bicubic), to [0, 1], normalize.

    Pillow's resize is used explicitly: it gives LAVIS's pixels bit by bit, torchvision's does not.
    Thread-safe. Source: lavis/processors/blip_processors.py.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._side = checkpoint.image_size
        try:
            self.backend = BlipImageProcessorPil.from_pretrained(
                checkpoint.folder, size={"height": self._side, "width": self._side}
            )
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"checkpoint {checkpoint.name!r} has no usable image processor "
                f"(preprocessor_config.json or processor_config.json) in {checkpoint.folder}"
            ) from error

    def __call__(self, image: Image.Image) -> torch.Tensor:
        """Float32 pixels of shape (3, S, S)."""
        # The backend would copy a large picture several times before it resizes it. What comes out
        # is the same: its own resize has nothing left to do.
        small = image if image.mode == "RGB" else image.convert("RGB")
        small = small.resize((self._side, self._side), self.backend.resample)
        pixels: torch.Tensor = self.backend(small, return_tensors="pt")["pixel_values"][0]
        return pixels

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Preprocessor) and self._recipe() == other._recipe()

    __hash__ = None  # type: ignore[assignment]

    def _recipe(self) -> dict[str, Any]:
        recipe: dict[str, Any] = self.backend.to_dict()
        return recipe
