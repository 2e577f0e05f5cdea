"""A served model: a generation checkpoint and, where matching is served, a retrieval one."""

import dataclasses
import hashlib
import logging
from collections.abc import Callable, Collection, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from msgspec.structs import replace
from PIL import Image

from blipq.contract import ErrorCode
from blipq.errors import PermanentError
from blipq_worker.blip2.adapters.attaching import attach
from blipq_worker.blip2.decoding.static import Way
from blipq_worker.blip2.generation.generator import Generator
from blipq_worker.blip2.generation.items import GeneratedText, GenerateItem
from blipq_worker.blip2.generation.sessions import WritingSession
from blipq_worker.blip2.heads.embedding import Arrays, Embedder, EmbedItem
from blipq_worker.blip2.heads.heatmaps import Explainer, ExplainItem, own_weights
from blipq_worker.blip2.heads.matching import Matcher, MatchItem, RerankItem
from blipq_worker.blip2.heads.scoring import Ranker, RankItem
from blipq_worker.blip2.loading.attention import Attention
from blipq_worker.blip2.loading.checkpoints import Checkpoint, open_checkpoint
from blipq_worker.blip2.loading.packing import pack
from blipq_worker.blip2.loading.precision import Dtype
from blipq_worker.blip2.loading.quantizing import Quantization, Quantizing
from blipq_worker.blip2.loading.weights import (
    Setup,
    load_instruction_tokenizer,
    load_tokenizer,
    load_weights,
)
from blipq_worker.blip2.text.instructions import Instructions
from blipq_worker.blip2.vision.cache import FeatureCache
from blipq_worker.blip2.vision.features import OnEncode, Side, Vision, equal_towers, split_tower
from blipq_worker.blip2.vision.instructed import InstructedVision
from blipq_worker.blip2.vision.preprocessing import Pixels, Preprocessor
from blipq_worker.catalog.adapters import Adapter, AdapterError, Flaw
from blipq_worker.catalog.resize import resized
from blipq_worker.catalog.s3.places import is_in_s3
from blipq_worker.inference.requests import Feature, ModelInfo, Reading
from blipq_worker.startup import START

log = logging.getLogger(__name__)

_Some = TypeVar("_Some", bound="Item")
Item = GenerateItem | RankItem | MatchItem | ExplainItem | RerankItem | EmbedItem


class Blip2:
    """A resident model.

    adapter: see ``Adapted``. One thread calls ``generate``, ``rank``, ``match``, ``explain``,
    ``rerank`` and ``embed``; the rest is thread-safe.
    """

    adapter = 0

    def __init__(
        self,
        info: ModelInfo,
        generator: Generator,
        matcher: Matcher | None = None,
        embedder: Embedder | None = None,
        explainer: Explainer | None = None,
        cache: FeatureCache | None = None,
    ) -> None:
        self.info = info
        self.generator = generator
        self.ranker = Ranker(generator)
        self.matcher = matcher
        self.embedder = embedder
        self.explainer = explainer
        self._cache = cache

    @classmethod
    def load(
        cls,
        generation: str,
        retrieval: str | None = None,
        *,
        quantization: Quantization = "none",
        quantize_vision: bool = False,
        dtype: Dtype = "auto",
        attention: Attention = "auto",
        compiled: bool = False,
        device: str = "cpu",
        slots: int = 32,
        static: bool = True,
        cache: FeatureCache | None = None,
        draft: bool = False,
        adapters: Sequence[Adapter] = (),
    ) -> "Blip2":
        """Loads the checkpoints (folders, hub ids, places in S3) onto ``device``; see ``loading``.

        slots, static: see ``Generator``. cache: keeps what is known of images between
        jobs. draft: see ``Recipe``. adapters: over the generation checkpoint, for ``adapted``.
        Raises CheckpointError, ValueError for a type or an attention that the device is no good
        at, AdapterError, and for checkpoints in S3 ModelError and S3ModelAway.
        """
        if adapters and compiled:
            raise AdapterError(Flaw.UNSUPPORTED, "BLIPQ_COMPILE compiles no layers with adapters")
        setup = Setup(
            device=torch.device(device),
            dtype=dtype,
            quantizing=Quantizing(quantization, quantize_vision),
            attention=attention,
            compiled=compiled,
        )
        cache = FeatureCache(0) if cache is None else cache
        written = _Part.load(generation, "generation", setup, draft)
        written.adapt(adapters)
        generator = Generator(
            written.checkpoint,
            written.model,
            written.tokenizer,
            written.vision(cache, adapters),
            slots=slots,
            static=static,
            instructions=written.instructions,
        )
        matched = None
        if retrieval is not None:
            matched = _Part.load(retrieval, "retrieval", setup, draft)
        matcher = embedder = explainer = None
        shares_vision = False
        if matched is not None:
            shares_vision = matched.share_tower(written)
            parts = matched.checkpoint, matched.model, matched.tokenizer, matched.vision(cache)
            matcher, embedder = Matcher(*parts), Embedder(*parts)
            own = own_weights(matched.model) if is_in_s3(matched.checkpoint.name) else None
            explainer = Explainer(matched.checkpoint, matcher.texts, matcher.vision, own)
        if not compiled:  # the compiler cannot read packed layers
            for part in filter(None, (written, matched)):
                pack(part.model)
        reading = Reading(str(written.checkpoint.folder), generator.room(0))
        info = _info(setup, written, matched, reading, shares_vision=shares_vision, slots=slots)
        return cls(info, generator, matcher, embedder, explainer, cache)

    def on_step(self, call: Callable[[], None]) -> None:
        """Has ``call`` called after every decode step, chunk of pairs, and pass of a part."""
        self.generator.on_step = call
        self.generator.vision.on_step = call
        self.ranker.on_step = call
        if self.matcher is not None and self.embedder is not None:
            self.matcher.on_step = call
            self.matcher.vision.on_step = call
            self.embedder.on_step = call
        if self.explainer is not None:
            self.explainer.on_step = call

    def on_encode(self, call: OnEncode) -> None:
        """Has ``call`` called after a pass that encoded images, with these and its milliseconds."""
        self.generator.vision.on_encode = call
        if self.matcher is not None:
            self.matcher.vision.on_encode = call

    def write_readings(self, folder: Path, name: str) -> None:
        """Writes the tokenizers to files in a folder, which ``info`` names from then on.

        For processes that count tokens without transformers: it may read a checkpoint's files in
        its own way, so what it has made of them is written. Raises OSError.
        """
        info = self.info
        path = folder / f"{name}-generation.json"
        self.generator.write_tokenizer(path)
        self.info = replace(info, reading=replace(info.reading, tokenizer=str(path)))
        if self.embedder is not None and info.retrieval_reading is not None:
            path = folder / f"{name}-retrieval.json"
            self.embedder.write_tokenizer(path)
            reading = replace(info.retrieval_reading, tokenizer=str(path))
            self.info = replace(self.info, retrieval_reading=reading)

    def preprocess(
        self, image: Image.Image, *, digest: str | None = None, whole: bool = False
    ) -> Pixels:
        """The image as both checkpoints take it, on the CPU; see ``Pixels``. Thread-safe."""
        views = [resized(image, recipe) for recipe in self.info.recipes]
        return self.pixels(views, digest=digest, whole=whole)

    def pixels(
        self,
        views: Sequence[bytes | memoryview],
        *,
        digest: str | None = None,
        whole: bool = False,
    ) -> Pixels:
        """An image of its bytes, resized by each of the model's ``recipes``. Thread-safe."""
        made = [
            # A copy: whoever lent the bytes may use them again.
            torch.frombuffer(bytearray(view), dtype=torch.uint8).view(recipe.side, recipe.side, 3)
            for view, recipe in zip(views, self.info.recipes, strict=True)
        ]
        matched = made[-1] if self.info.retrieval_recipe is not None else None
        return Pixels(made[0], matched, digest=digest, whole=whole)

    def forget(self, digests: Collection[str]) -> None:
        """Drops what is known of images. Thread-safe."""
        if self._cache is not None:
            self._cache.forget(digests)

    def recall(self, digest: str, needed: Collection[Feature]) -> Pixels | None:
        """An image seen before, if all that is needed of it is still known. Thread-safe."""
        names = [self._name(feature) for feature in needed]
        if self._cache is None or None in names:
            return None
        known = {name: self._cache.get(digest, name) for name in names if name is not None}
        features = {name: tensor for name, tensor in known.items() if tensor is not None}
        if len(features) < len(known):
            return None
        return Pixels(None, digest=digest, features=features)

    def _name(self, feature: Feature) -> str | None:
        """The feature's name in the cache; None for what the served model does not have."""
        if feature == "generation":
            return self.generator.vision.needed(self.adapter)
        if self.matcher is None:
            return None
        vision = self.matcher.vision
        return vision.name if feature == "retrieval" else vision.tower

    def check(self, item: Item) -> None:
        """Raises PermanentError where the item could not run. Thread-safe.

        For the job's own thread, so that a text that is too long spoils no batch.
        """
        match item:
            case GenerateItem():
                self.generator.check(item.prompts, item.params)
            case RankItem():
                self.ranker.check(item.prompts, item.choices)
            case MatchItem() | ExplainItem() | RerankItem():
                self._matcher()
            case EmbedItem():
                self._embedder().check(item)

    def open_slots(self, among: Sequence[Way], *, slots: int | None, budget: int) -> None:
        """Has texts in flight written in static slots. See ``Generator.open_slots``."""
        self.generator.open_slots(among, slots=slots, budget=budget)
        way = self.generator.way
        self.info = replace(self.info, slots=self.static_slots or self.info.slots, decoding=way)

    @property
    def static_slots(self) -> int:
        """Static slots for texts in flight; 0 where there are none."""
        return self.generator.static_slots

    def is_long(self, item: GenerateItem) -> bool:
        """Whether an item belongs in ``long_session``. See ``Generator.is_long``. Thread-safe."""
        return self.generator.is_long(item.prompts, item.params)

    def session(self) -> WritingSession:
        """Where items join and leave. See ``Generator.session``."""
        return self.generator.session()

    def long_session(self) -> WritingSession:
        """The same of long items. See ``Generator.long_session``."""
        return self.generator.long_session()

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

    def explain(self, items: Sequence[ExplainItem]) -> list[Arrays]:
        """Where the matching head looked, per item. See ``Explainer.explain``.

        Raises PermanentError ``model_unavailable`` without a retrieval checkpoint.
        """
        if self.explainer is None:
            raise self._no_retrieval()
        return self.explainer.explain(items)

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

    def adapted(self, number: int, info: ModelInfo) -> "Adapted":
        """The model with one of its adapters, numbered from 1, under an ``info`` of its own."""
        return Adapted(self, number, info)

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


class Adapted(Blip2):
    """A resident model with a LoRA adapter: all but the adapter is the other's.

    adapter: its number; see ``adapters.layers.Rows``. Items of both, and of others over the same
    resident, can run together there, where they say their adapter themselves.
    """

    def __init__(self, resident: Blip2, number: int, info: ModelInfo) -> None:
        super().__init__(
            info,
            resident.generator,
            resident.matcher,
            resident.embedder,
            resident.explainer,
            resident._cache,
        )
        self.resident, self.adapter = resident, number
        self.ranker = resident.ranker

    def generate(
        self, items: Sequence[GenerateItem], wanted: Callable[[int], bool] = lambda index: True
    ) -> list[list[list[GeneratedText]]]:
        """Texts with the adapter."""
        return super().generate([self.of(item) for item in items], wanted)

    def rank(self, items: Sequence[RankItem]) -> list[list[list[float]]]:
        """Log-likelihoods with the adapter."""
        return super().rank([self.of(item) for item in items])

    def of(self, item: _Some) -> _Some:
        """The item as the resident takes it for this adapter; others than texts are the same."""
        if isinstance(item, GenerateItem | RankItem):
            return dataclasses.replace(item, adapter=self.adapter)
        return item


def _info(
    setup: Setup,
    written: "_Part",
    matched: "_Part | None",
    reading: Reading,
    *,
    shares_vision: bool,
    slots: int,
) -> ModelInfo:
    return ModelInfo(
        checkpoint=written.checkpoint.name,
        family=written.checkpoint.family,
        dtype=str(setup.precision(written.checkpoint.family)),
        quantization=str(setup.quantizing),
        device=str(setup.device),
        revision=written.checkpoint.revision,
        default_prompt=written.checkpoint.default_prompt,
        recipe=written.preprocessor.recipe,
        reading=reading,
        retrieval_checkpoint=matched.checkpoint.name if matched else None,
        retrieval_revision=matched.checkpoint.revision if matched else None,
        retrieval_recipe=matched.preprocessor.recipe if matched else None,
        retrieval_reading=matched.reading if matched else None,
        shares_vision=shares_vision,
        slots=slots,
        gpu=_gpu(setup.device),
        instructed=written.checkpoint.instructed,
    )


def _gpu(device: torch.device) -> str:
    """The UUID of a GPU as NVML has it; "" for a CPU, and where this torch does not know it."""
    if device.type != "cuda":
        return ""
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    return "" if uuid is None else f"GPU-{uuid}"


@dataclass(slots=True)
class _Part:
    """One loaded checkpoint of a served model.

    tower, queries: see ``Vision``. instructions: see ``Generator``.
    """

    side: Side
    checkpoint: Checkpoint
    model: Any
    tokenizer: Any
    preprocessor: Preprocessor
    tower: str
    queries: str
    instructions: Instructions | None = None

    @classmethod
    def load(cls, name: str, side: Side, setup: Setup, draft: bool) -> "_Part":
        with START.part("digest of weights"):
            checkpoint = open_checkpoint(name)
        with closing(checkpoint):
            with START.part("weights to the device"):
                model = load_weights(checkpoint, setup)
            split_tower(model)
            preprocessor = Preprocessor(checkpoint, draft=draft)
            tokenizer = load_tokenizer(checkpoint)
            instructions = None
            if checkpoint.instructed:
                reader = load_instruction_tokenizer(checkpoint)
                instructions = Instructions(checkpoint, reader)
        precision = f"{setup.precision(checkpoint.family)}/{setup.quantizing}/{setup.attention}"
        # Beside the weights, what a configuration makes of them: folders with equal weights may
        # differ in the epsilon of their LayerNorms.
        config = hashlib.sha256(checkpoint.config.to_json_string().encode()).hexdigest()[:16]
        version = f"{checkpoint.revision}/{config}/{precision}/{preprocessor.recipe.version}"
        return cls(
            side=side,
            checkpoint=dataclasses.replace(checkpoint, pushed=None),  # it holds keys of S3
            model=model,
            tokenizer=tokenizer,
            preprocessor=preprocessor,
            tower=f"tower/{version}",
            queries=f"queries/{version}",
            instructions=instructions,
        )

    def adapt(self, adapters: Sequence[Adapter]) -> None:
        """Puts adapters beside its layers. Raises AdapterError."""
        if adapters and self.checkpoint.instructed:
            text = f"{adapters[0].folder}: adapters of InstructBLIP are not served"
            raise AdapterError(Flaw.UNSUPPORTED, text)
        for adapter in adapters:
            adapter.require_base(self.checkpoint.name)
        attach(self.model, adapters)

    def share_tower(self, other: "_Part") -> bool:
        """Takes the other's vision tower where it is the same, and lets its own go."""
        alike = self.preprocessor.recipe.version == other.preprocessor.recipe.version
        shared = alike and equal_towers(self.model.vision_model, other.model.vision_model)
        if shared:
            self.model.vision_model, self.tower = other.model.vision_model, other.tower
        names = self.checkpoint.name, other.checkpoint.name
        log.info("%s and %s %s one vision tower", *names, "share" if shared else "do not share")
        return shared

    @property
    def reading(self) -> Reading:
        """How a retrieval checkpoint reads texts to embed."""
        longest = self.checkpoint.config.qformer_config.max_position_embeddings
        return Reading(str(self.checkpoint.folder), longest)

    def vision(self, cache: FeatureCache, adapters: Sequence[Adapter] = ()) -> Vision:
        numbered = enumerate(adapters, start=1)
        kind = InstructedVision if self.checkpoint.instructed else Vision
        return kind(
            self.model,
            side=self.side,
            tower=self.tower,
            queries=self.queries,
            table=self.preprocessor.table,
            cache=cache,
            adapted={
                number: f"{self.queries}/{adapter.digest()}"
                for number, adapter in numbered
                if adapter.changes_queries
            },
        )
