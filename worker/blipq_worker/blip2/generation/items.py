"""What is to be written about an image, and what was."""

from dataclasses import dataclass, field
from typing import Protocol

from blipq_worker.blip2.vision.preprocessing import Pixels
from blipq_worker.inference.requests import FinishReason, GenerationParams


class Asking(Protocol):
    """An item that goes on from an image and prompts."""

    @property
    def pixels(self) -> Pixels: ...
    @property
    def prompts(self) -> tuple[str, ...]: ...
    @property
    def adapter(self) -> int: ...


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
    """A text and how many tokens it has, its end token included; and how sure of it the model was.

    See ``inference.requests.GeneratedText``. Its numbers are not compared: their last bits, unlike
    the text, depend on the batch neighbours.
    """

    text: str
    tokens: int
    log_likelihood: float | None = field(default=None, compare=False)
    mean_token_probability: float | None = field(default=None, compare=False)
    finish_reason: FinishReason | None = None
    rewritten: bool = False
    logprobs: tuple[tuple[int, str, float], ...] | None = field(default=None, compare=False)
