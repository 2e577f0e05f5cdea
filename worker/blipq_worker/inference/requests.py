"""Requests to an engine and its responses, as plain data: no torch, no queue, no socket.

Items are frozen and may be shared between threads. Bounds are part of the types: they are checked
when a message is decoded, not when an item is made. A bounded number is never NaN or infinite.
"""

import itertools
from typing import Annotated, Literal

from msgspec import Meta, Struct

Priority = Literal["high", "normal", "low"]
#: The language model of a generation checkpoint, or what has none.
Family = Literal["opt", "t5", "llama", "retrieval"]
#: What is known of an image: the queries of the generation or of the retrieval checkpoint, or the
#: vision tower's output.
Feature = Literal["generation", "retrieval", "patches"]

Text = Annotated[str, Meta(max_length=32_768)]
Name = Annotated[str, Meta(min_length=1, max_length=256)]
#: Of a process, in logs.
ProcessName = Annotated[str, Meta(max_length=64, pattern=r"^[A-Za-z0-9._@:-]+\Z")]
Digest = Annotated[str, Meta(min_length=64, max_length=64, pattern=r"^[0-9a-f]*\Z")]
#: A W3C ``traceparent``, or "".
TraceParent = Annotated[str, Meta(max_length=55)]
Count = Annotated[int, Meta(ge=0, lt=2**53)]
Seconds = Annotated[float, Meta(ge=0, le=1e9)]


class Origin:
    """Stands for an image that several items share: one object for all of them, on either side."""

    __slots__ = ("__weakref__", "number")
    _numbers = itertools.count(1)

    def __init__(self, number: int | None = None) -> None:
        self.number = next(self._numbers) if number is None else number


class ImagePixels:
    """An image as both checkpoints take it: resized on the front, not normalized. Never changed.

    digest: names it; None for an image that is not to be remembered. A front takes the SHA-256 of
    the file; behind a socket a backend finds that of the pixels instead (see ``front.Names``).
    whole: the vision tower's output will be needed more than once. pixels: for each recipe of the
    model one view of side x side x 3 bytes (uint8, RGB, rows from the top), kept flat; empty where
    the engine knows the image by its digest. origin: whose items share them; by default its own,
    so that items of one image must share this very object. ValueError for views that are not
    C-contiguous.
    """

    # Neither a Struct nor a dataclass: msgspec would put the pixels into the body.
    __slots__ = ("digest", "origin", "pixels", "whole")

    def __init__(
        self,
        digest: str | None = None,
        whole: bool = False,
        pixels: tuple[memoryview, ...] = (),
        origin: Origin | None = None,
    ) -> None:
        self.digest, self.whole = digest, whole
        self.origin = Origin() if origin is None else origin
        try:
            self.pixels = tuple(view.cast("B") for view in pixels)
        except TypeError as error:
            raise ValueError(f"pixels must be C-contiguous: {error}") from error

    @property
    def size(self) -> int:
        """Bytes of pixels."""
        return sum(view.nbytes for view in self.pixels)


OnLoop = Literal["keep", "end", "rewrite"]


class Plain(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Encoded as an array of exactly its fields."""


class GenerationParams(Plain, frozen=True):
    """How texts are chosen, under Hugging Face's names; lengths count new tokens; top_k 0: off.

    on_loop: whether a text that repeats itself goes on, ends there, or is written once more.
    logprobs: whether the answer has each token's probability.
    """

    max_new_tokens: Annotated[int, Meta(ge=1, le=512)] = 30
    min_new_tokens: Annotated[int, Meta(ge=0, le=512)] = 1
    num_beams: Annotated[int, Meta(ge=1, le=16)] = 5
    do_sample: bool = False
    temperature: Annotated[float, Meta(gt=0, le=10)] = 1.0
    top_p: Annotated[float, Meta(gt=0, le=1)] = 0.9
    top_k: Annotated[int, Meta(ge=0, le=1000)] = 50
    repetition_penalty: Annotated[float, Meta(gt=0, le=10)] = 1.0
    no_repeat_ngram_size: Annotated[int, Meta(ge=0, le=32)] = 0
    length_penalty: Annotated[float, Meta(ge=-10, le=10)] = 1.0
    num_return_sequences: Annotated[int, Meta(ge=1, le=16)] = 1
    seed: Annotated[int, Meta(ge=0, le=2**63 - 1)] | None = None
    on_loop: OnLoop = "keep"
    logprobs: bool = False


Prompts = Annotated[tuple[Text, ...], Meta(min_length=1, max_length=64)]
Texts = Annotated[tuple[Text, ...], Meta(min_length=1, max_length=256)]


class Generate(Plain, frozen=True, tag="generate"):
    """One image and the prompts to go on from; an empty prompt is allowed."""

    image: ImagePixels
    prompts: Prompts
    params: GenerationParams


class Rank(Plain, frozen=True, tag="rank"):
    """One image, the prompts that ask about it, and the answers that each may have."""

    image: ImagePixels
    prompts: Prompts
    choices: Texts


class Match(Plain, frozen=True, tag="match"):
    """One image and the texts to score against it, as the caller wrote them."""

    image: ImagePixels
    texts: Texts
    head: Literal["itm", "itc"] = "itm"


class Explain(Plain, frozen=True, tag="explain"):
    """One image and the texts for which to compute heat maps of the matching head."""

    image: ImagePixels
    texts: Texts


class Rerank(Plain, frozen=True, tag="rerank"):
    """An image that is near a text, to be looked at together with it."""

    image: ImagePixels
    text: Text


class Embed(Plain, frozen=True, tag="embed"):
    """What to embed: an image (``image``), a text (``text``), or both read together."""

    mode: Literal["image", "text", "multimodal"]
    image: ImagePixels | None = None
    text: Text | None = None

    def __post_init__(self) -> None:
        """ValueError where the mode lacks its image or its text, or has one too many."""
        given = self.image is not None, self.text is not None
        if given != (self.mode != "text", self.mode != "image"):
            raise ValueError(f"mode {self.mode!r} has other inputs")


Item = Generate | Rank | Match | Explain | Rerank | Embed


# --- answers --------------------------------------------------------------------------------------


FinishReason = Literal["stop", "length", "loop"]


class GeneratedText(Plain, frozen=True):
    """A text and how many tokens it has, its end token included; and how sure of it the model was.

    log_likelihood: the sum of the natural logarithms of its tokens' probabilities.
    mean_token_probability: the arithmetic mean of these. Both are of the model's own distribution,
    before temperature, penalties and bans; None where a probability is 0. finish_reason: ``stop``,
    an end token; ``length``, its longest; ``loop``, it repeated itself, which is cut off.
    rewritten: the first try was a loop. logprobs: each token's id, text and logarithm, if wanted.
    """

    text: str
    tokens: int
    log_likelihood: float | None = None
    mean_token_probability: float | None = None
    finish_reason: FinishReason | None = None
    rewritten: bool = False
    logprobs: tuple[tuple[int, str, float], ...] | None = None


class Generated(Plain, frozen=True, tag="generated"):
    """Texts per prompt: several where several were requested, best first."""

    texts: tuple[tuple[GeneratedText, ...], ...]


class Ranked(Plain, frozen=True, tag="ranked"):
    """A log-likelihood per choice, per prompt."""

    likelihoods: tuple[tuple[float, ...], ...]


class Matched(Plain, frozen=True, tag="matched"):
    """A score per text."""

    scores: tuple[float, ...]


class Reranked(Plain, frozen=True, tag="reranked"):
    """The matching logit and the probability of a match."""

    logit: float
    probability: float


class Array(Plain, frozen=True):
    """Little-endian float32 in C order."""

    shape: tuple[int, ...]
    data: bytes


class Embedded(Plain, frozen=True, tag="embedded"):
    """Features by name; of an ``Explain``, maps by the number of their text, counted from "0"."""

    arrays: dict[str, Array]


Value = Generated | Ranked | Matched | Reranked | Embedded


class Answer(Plain, frozen=True, tag="answer"):
    """What an item came to, and what it took.

    pass_ms: from its start on the device to its end. vision_ms: of these, looking at the image; 0
    where all was known. batch_size: the most items that ran together with it, itself included.
    shared: an equal item that was in flight was computed, and this one waited for its answer.
    device_ms: its share of the passes and steps that it took part in, by its rows: over all items
    these come to the time that the device was at work. span: of its pass, or "". first_token_ms:
    from its start to the first token of a text, to a step; 0 where none is written.
    """

    value: Value
    pass_ms: float
    vision_ms: float
    batch_size: int
    shared: bool = False
    device_ms: float = 0.0
    span: TraceParent = ""
    first_token_ms: float = 0.0


class Failure(Plain, frozen=True, tag="failure"):
    """Why an item has no answer.

    kind: ``permanent``: the same item would fail again. ``transient``: it may pass later.
    ``internal``: a fault of the engine's. ``image_unknown``: the image came without pixels and was
    forgotten meanwhile: ask again, with pixels. ``cancelled``: nobody waits for it, or its deadline
    has passed. trace: an internal failure's traceback, for the log of whoever knows the job.
    """

    kind: Literal["permanent", "transient", "internal", "image_unknown", "cancelled"]
    code: str
    message: str
    trace: str = ""


Outcome = Answer | Failure


# --- models ---------------------------------------------------------------------------------------


class Recipe(Plain, frozen=True):
    """How a checkpoint wants an image: squashed to ``side`` x ``side``, in RGB.

    resample: Pillow's number of the filter. version: names the whole recipe, normalization
    included; equal versions make equal pixels. draft: large JPEGs may be decoded at a part of their
    size, at least twice the side.
    """

    side: Annotated[int, Meta(ge=1, le=1024)]
    resample: Annotated[int, Meta(ge=0, le=5)]
    version: Name
    draft: bool = False

    @property
    def size(self) -> int:
        """Bytes of an image."""
        return self.side * self.side * 3


class Reading(Plain, frozen=True):
    """How a checkpoint reads texts, so that fronts can count tokens.

    tokenizer: a file of the library tokenizers, or a folder with one. positions: the most tokens of
    a text; on all but T5 the new ones are among them.
    """

    tokenizer: str
    positions: Annotated[int, Meta(ge=0)]


class ModelInfo(Plain, frozen=True):
    """A served model, as far as fronts must know it.

    dtype: of the vision tower and the language model, joined by "/" where they differ.
    quantization: none, int8 or nf4, and "+vision" where the tower is quantized, too. revision:
    the hub's commit, or the SHA-256 of the weights. default_prompt: for captions without one.
    shares_vision: one vision tower serves both checkpoints. recipe, reading: of the generation
    checkpoint; the retrieval checkpoint's are None without one. slots: texts that are written at
    once. decoding: how, in a few words for people. load_seconds: what loading its weights took.
    gpu: the UUID of its GPU, as NVML knows it; "" for a CPU.
    instructed: the Q-Former reads the prompt beside the image, as InstructBLIP's does.
    """

    checkpoint: str
    family: Family
    dtype: str
    quantization: str
    device: str
    revision: str
    default_prompt: str
    recipe: Recipe
    reading: Reading
    retrieval_checkpoint: str | None = None
    retrieval_revision: str | None = None
    retrieval_recipe: Recipe | None = None
    retrieval_reading: Reading | None = None
    shares_vision: bool = False
    slots: Annotated[int, Meta(ge=1, le=65_536)] = 32
    decoding: Annotated[str, Meta(max_length=128)] = "growing slots"
    load_seconds: Seconds = 0.0
    gpu: Annotated[str, Meta(max_length=128)] = ""
    instructed: bool = False

    @property
    def image_size(self) -> int:
        """The side of the square that the generation checkpoint sees, in pixels."""
        return self.recipe.side

    @property
    def way(self) -> str:
        """How texts are written, and where: for people."""
        return f"{self.decoding} on {self.device}"

    @property
    def has_retrieval(self) -> bool:
        """Whether ``Match``, ``Rerank`` and ``Embed`` are served."""
        return self.retrieval_checkpoint is not None

    @property
    def recipes(self) -> tuple[Recipe, ...]:
        """The recipes of an image's pixels, in their order: one where both are equal."""
        other = self.retrieval_recipe
        if other is None or other.version == self.recipe.version:
            return (self.recipe,)
        return self.recipe, other

    @property
    def pixels_size(self) -> int:
        """Bytes of an image's pixels."""
        return sum(recipe.size for recipe in self.recipes)

    def split(self, pixels: memoryview) -> tuple[memoryview, ...]:
        """An image's pixels by recipe, where they lie one behind the other."""
        views, start = [], 0
        for recipe in self.recipes:
            views.append(pixels[start : start + recipe.size])
            start += recipe.size
        return tuple(views)

    def room(self, new_tokens: int) -> int:
        """The most tokens that a prompt may have, where ``new_tokens`` must follow it."""
        taken = 0 if self.family == "t5" else new_tokens
        return max(0, self.reading.positions - taken)


class Load(Plain, frozen=True):
    """What an engine is busy with: items that wait, and items that run.

    stalled_s: seconds since what runs last made progress; 0 where nothing runs.
    """

    waiting: Count
    running: Count
    stalled_s: Seconds = 0.0


def check_pixels(item: Item, model: ModelInfo) -> None:
    """ValueError where the image's pixels are not what the model takes."""
    if item.image is None:
        return
    given = [view.nbytes for view in item.image.pixels]
    wanted = [recipe.size for recipe in model.recipes]
    if given and given != wanted:
        raise ValueError(f"pixels of {given} bytes, where the model takes {wanted}")
    if not given and item.image.digest is None:
        raise ValueError("an image without pixels and without a digest")
