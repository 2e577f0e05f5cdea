"""What is to be written about an image, and what was."""

from dataclasses import dataclass

from blipq_worker.blip2.vision.preprocessing import Pixels
from blipq_worker.inference.requests import GenerationParams


@dataclass(frozen=True, slots=True, eq=False)
class GenerateItem:
    """One image and the prompts to go on from; an empty prompt is allowed.

    adapter: see ``adapters.layers.Rows``.
    """

    pixels: Pixels
    prompts: tuple[str, ...]
    params: GenerationParams
    adapter: int = 0


@dataclass(frozen=True, slots=True)
class GeneratedText:
    """A text and how many tokens were generated for it, its end token included."""

    text: str
    tokens: int
