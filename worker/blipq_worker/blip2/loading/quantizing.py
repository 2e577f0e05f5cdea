"""Which weights are quantized, and how. Imports neither torch nor transformers."""

from dataclasses import dataclass
from typing import Literal

from blipq_worker.inference.requests import Family

Quantization = Literal["none", "int8", "nf4"]

# By itself bitsandbytes would quantize the vision tower, the projection and the heads, too, and a
# matching head that is quantized fails on its first use. A list replaces bitsandbytes' own default,
# which is why lm_head must be in it. T5's `wo` is kept by transformers, whatever the list has.
_NEVER_QUANTIZED = ("qformer", "language_projection", "lm_head")
_HEADS = ("itm_head", "vision_projection", "text_projection")
_VISION = "vision_model"


@dataclass(frozen=True, slots=True)
class Quantizing:
    """How weights are quantized. vision: the tower of every checkpoint, too.

    The tower is what every answer rests on, so it is left alone unless memory is short.
    """

    method: Quantization = "none"
    vision: bool = False

    def applies_to(self, family: Family) -> bool:
        """Whether anything of such a checkpoint is quantized: a retrieval one has only a tower."""
        return self.method != "none" and (family != "retrieval" or self.vision)

    @property
    def skipped(self) -> list[str]:
        """The modules that bitsandbytes must leave alone."""
        kept = [*_NEVER_QUANTIZED, *_HEADS]
        return kept if self.vision else [_VISION, *kept]

    def __str__(self) -> str:
        return f"{self.method}+vision" if self.vision and self.method != "none" else self.method
