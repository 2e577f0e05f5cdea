"""A decoded image to the pixels that a vision tower takes."""

import hashlib
from dataclasses import dataclass, field

import torch
from PIL import Image
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

from blipq_worker.blip2.loading.checkpoints import Checkpoint, CheckpointError

# What of an image processor's configuration makes a difference to the pixels.
_RECIPE = (
    *("size", "resample", "do_rescale", "rescale_factor"),
    *("do_normalize", "image_mean", "image_std"),
)


@dataclass(slots=True, eq=False, weakref_slot=True)
class Pixels:
    """One image on its way through the model: float32 tensors of shape (3, S, S), on the CPU.

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
        except Exception as error:  # transformers raises many kinds on a malformed configuration
            raise CheckpointError(
                f"checkpoint {checkpoint.name!r} has no usable image processor "
                f"(preprocessor_config.json or processor_config.json) in {checkpoint.folder}"
            ) from error
        recipe = repr([getattr(self.backend, name) for name in _RECIPE])
        #: Names the recipe: equal versions make equal pixels.
        self.version = hashlib.sha256(recipe.encode()).hexdigest()[:16]

    def __call__(self, image: Image.Image) -> torch.Tensor:
        """Float32 pixels of shape (3, S, S)."""
        # The backend would copy a large picture several times before it resizes it. What comes out
        # is the same: its own resize has nothing left to do.
        small = image if image.mode == "RGB" else image.convert("RGB")
        small = small.resize((self._side, self._side), self.backend.resample)
        pixels: torch.Tensor = self.backend(small, return_tensors="pt")["pixel_values"][0]
        return pixels
