"""A served model: a generation checkpoint and, where matching is served, a retrieval one."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from PIL import Image

from blipq.contract import ErrorCode
from blipq.errors import PermanentError
from blipq_worker.blip2.checkpoints import Checkpoint, Family, open_checkpoint
from blipq_worker.blip2.choices import Ranker, RankItem
from blipq_worker.blip2.embedding import Arrays, Embedder, EmbedItem
from blipq_worker.blip2.generation import GeneratedText, GenerateItem, Generator
from blipq_worker.blip2.loading import (
    Attention,
    Dtype,
    Quantization,
    Quantizing,
    Setup,
    load_tokenizer,
    load_weights,
)
from blipq_worker.blip2.preprocessing import Pixels, Preprocessor
from blipq_worker.blip2.retrieval import Matcher, MatchItem, RerankItem
from blipq_worker.blip2.sessions import WritingSession

Item = GenerateItem | RankItem | MatchItem | RerankItem | EmbedItem


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What answers came from.

    dtype: of the vision tower and the language model, joined by "/" where they differ.
    quantization: none, int8 or nf4, and "+vision" where the tower is quantized, too. revision:
    the hub's commit, or the SHA-256 of the weights. image_size: side of the square that the
    generation checkpoint sees, in pixels. default_prompt: for captions without one.
    """

    checkpoint: str
    family: Family
    dtype: str
    quantization: str
    device: str
    revision: str
    image_size: int
    default_prompt: str
    retrieval_checkpoint: str | None = None
    retrieval_revision: str | None = None

    @property
    def has_retrieval(self) -> bool:
        """Whether ``match`` and ``embed`` are served."""
        return self.retrieval_checkpoint is not None


class Blip2:
    """A resident model.

    One thread calls ``generate``, ``rank``, ``match``, ``rerank`` and ``embed``; the rest is
    thread-safe.
    """

    def __init__(
        self,
        info: ModelInfo,
        generator: Generator,
        preprocessor: Preprocessor,
        matcher: Matcher | None = None,
        embedder: Embedder | None = None,
        match_preprocessor: Preprocessor | None = None,
    ) -> None:
        self.info = info
        self.generator = generator
        self.ranker = Ranker(generator)
        self.matcher = matcher
        self.embedder = embedder
        self._preprocessor = preprocessor
        self._match_preprocessor = match_preprocessor

    @classmethod
    def load(
        cls,
        generation: str,
        retrieval: str | None = None,
        *,
        quantization: Quantization = "none",
        quantize_vision: bool = False,
        dtype: Dtype = "auto",
        attention: Attention = "sdpa",
        compiled: bool = False,
        device: str = "cpu",
        slots: int = 32,
        max_beams: int = 80,
    ) -> "Blip2":
        """Loads the checkpoints (folders or hub ids) onto ``device``; see ``loading``.

        slots, max_beams: see ``Generator``. Raises CheckpointError, and ValueError for a type or an
        attention that the device is no good at.
        """
        setup = Setup(
            device=torch.device(device),
            dtype=dtype,
            quantizing=Quantizing(quantization, quantize_vision),
            attention=attention,
            compiled=compiled,
        )
        written = open_checkpoint(generation)
        matched = open_checkpoint(retrieval) if retrieval is not None else None
        generator = Generator(
            written,
            load_weights(written, setup),
            load_tokenizer(written),
            slots=slots,
            max_beams=max_beams,
        )
        matcher, embedder = _retrieval(matched, setup) if matched else (None, None)
        info = ModelInfo(
            checkpoint=written.name,
            family=written.family,
            dtype=str(setup.precision(written.family)),
            quantization=str(setup.quantizing),
            device=device,
            revision=written.revision,
            image_size=written.image_size,
            default_prompt=written.default_prompt,
            retrieval_checkpoint=matched.name if matched else None,
            retrieval_revision=matched.revision if matched else None,
        )
        return cls(
            info,
            generator,
            Preprocessor(written),
            matcher,
            embedder,
            Preprocessor(matched) if matched else None,
        )

    def on_step(self, call: Callable[[], None]) -> None:
        """Has ``call`` called after every decode step and chunk of pairs."""
        self.generator.on_step = call
        self.ranker.on_step = call
        if self.matcher is not None:
            self.matcher.on_step = call

    def preprocess(self, image: Image.Image) -> Pixels:
        """The image as both checkpoints take it, on the CPU. Thread-safe."""
        pixels = self._preprocessor(image)
        if self._match_preprocessor is None:
            return Pixels(pixels)
        if self._match_preprocessor == self._preprocessor:
            return Pixels(pixels, pixels)
        return Pixels(pixels, self._match_preprocessor(image))

    def check(self, item: Item) -> None:
        """Raises PermanentError where the item could not run. Thread-safe.

        For the job's own thread, so that a text that is too long spoils no batch.
        """
        match item:
            case GenerateItem():
                self.generator.check(item.prompts, item.params)
            case RankItem():
                self.ranker.check(item.prompts, item.choices)
            case MatchItem() | RerankItem():
                self._matcher()
            case EmbedItem():
                self._embedder().check(item)

    def session(self) -> WritingSession:
        """Where items without beams join and leave. See ``Generator.session``."""
        return self.generator.session()

    def generate(
        self, items: Sequence[GenerateItem], wanted: Callable[[int], bool] = lambda index: True
    ) -> list[list[list[GeneratedText]]]:
        """Texts per item, per prompt, per returned sequence. See ``Generator.generate``."""
        return self.generator.generate(items, wanted)

    def rank(self, items: Sequence[RankItem]) -> list[list[list[float]]]:
        """A log-likelihood per choice, per prompt, per item. See ``Ranker.rank``."""
        return self.ranker.rank(items)

    def match(self, items: Sequence[MatchItem]) -> list[list[float]]:
        """A score per text, per item. See ``Matcher.match``.

        Raises PermanentError ``model_unavailable`` without a retrieval checkpoint.
        """
        return self._matcher().match(items)

    def rerank(self, items: Sequence[RerankItem]) -> list[tuple[float, float]]:
        """The matching logit and the probability of a match, per item. See ``Matcher.rerank``.

        Raises PermanentError ``model_unavailable`` without a retrieval checkpoint.
        """
        return self._matcher().rerank(items)

    def embed(self, items: Sequence[EmbedItem]) -> list[Arrays]:
        """Features by name, per item. See ``Embedder.embed``.

        Raises PermanentError ``model_unavailable`` without a retrieval checkpoint.
        """
        return self._embedder().embed(items)

    def _matcher(self) -> Matcher:
        if self.matcher is None:
            raise self._no_retrieval()
        return self.matcher

    def _embedder(self) -> Embedder:
        if self.embedder is None:
            raise self._no_retrieval()
        return self.embedder

    def _no_retrieval(self) -> PermanentError:
        message = f"the served model {self.info.checkpoint!r} has no retrieval checkpoint"
        return PermanentError(ErrorCode.MODEL_UNAVAILABLE, message)


def _retrieval(checkpoint: Checkpoint, setup: Setup) -> tuple[Matcher, Embedder]:
    weights = load_weights(checkpoint, setup)
    tokenizer = load_tokenizer(checkpoint)
    return Matcher(checkpoint, weights, tokenizer), Embedder(checkpoint, weights, tokenizer)
