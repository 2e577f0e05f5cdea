"""Resized images to the numbers that a vision tower takes."""

import hashlib
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

from blipq_worker.blip2.loading.checkpoints import Checkpoint, CheckpointError
from blipq_worker.inference.requests import Recipe

# What of an image processor's configuration makes a difference to the pixels.
_RECIPE = (
    *("size", "resample", "do_rescale", "rescale_factor"),
    *("do_normalize", "image_mean", "image_std"),
)


@dataclass(slots=True, eq=False, weakref_slot=True)
class Pixels:
    """One image on its way through the model: uint8 tensors of shape (S, S, 3), on the CPU.

    ``retrieval`` is None without a retrieval checkpoint, and the same tensor as ``generation``
    where both checkpoints preprocess alike. Both are None where all that the job needs is known:
    then it is in ``features``, by name.

    digest: the SHA-256 of the file; None for an image that is not to be remembered. whole: the
    vision tower's output will be needed more than once.
    """

    generation: torch.Tensor | None
    retrieval: torch.Tensor | None = None
    digest: str | None = None
    whole: bool = False
    features: dict[str, torch.Tensor] = field(default_factory=dict)


class Preprocessor:
    """A checkpoint's image processor, in two parts: resizing, and what comes of each byte then.

    recipe: see ``catalog.resize``. table: (3, 256) float32, what rescaling and normalizing make of
    each value of red, green and blue; the processor's own arithmetic filled it, so that a lookup
    gives its numbers bit by bit.
    """

    def __init__(self, checkpoint: Checkpoint, *, draft: bool = False) -> None:
        side = checkpoint.image_size
        try:
            self.backend = BlipImageProcessorPil.from_pretrained(
                checkpoint.folder, size={"height": side, "width": side}
            )
        except Exception as error:  # transformers raises many kinds on a malformed configuration
            raise CheckpointError(
                f"checkpoint {checkpoint.name!r} has no usable image processor "
                f"(preprocessor_config.json or processor_config.json) in {checkpoint.folder}"
            ) from error
        settings = repr([*(getattr(self.backend, name) for name in _RECIPE), draft])
        version = hashlib.sha256(settings.encode()).hexdigest()[:16]
        self.recipe = Recipe(side, int(self.backend.resample), version, draft)
        self.table = self._table()

    def _table(self) -> torch.Tensor:
        values = np.arange(256, dtype=np.uint8).reshape(16, 16, 1)
        every = Image.fromarray(np.ascontiguousarray(np.broadcast_to(values, (16, 16, 3))))
        made = self.backend(every, do_resize=False, return_tensors="pt")["pixel_values"]
        table: torch.Tensor = made.reshape(3, 256).float()
        return table


def normalized(images: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Resized images, uint8 (B, S, S, 3), by a ``Preprocessor``'s table: float32 (B, 3, S, S)."""
    starts = torch.arange(3, device=images.device, dtype=torch.int32) * table.shape[1]
    found = table.flatten()[images.int() + starts]
    # Contiguous, as stacked images are: convolutions may round otherwise for another layout.
    return found.permute(0, 3, 1, 2).contiguous()
