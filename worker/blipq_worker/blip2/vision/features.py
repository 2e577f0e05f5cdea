"""From images and texts to what both kinds of checkpoint go on from. An image is looked at once.

The vision tower takes most of a job's time, so what it and the Q-Former make of an image is kept:
with the job, and in a cache for the jobs that follow. Hidden sizes are those of the published
checkpoints.
"""

import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, Literal

import torch

from blipq_worker.blip2.adapters.layers import rows_of
from blipq_worker.blip2.cuda.batches import CapturedPass
from blipq_worker.blip2.cuda.capture import Run
from blipq_worker.blip2.vision.cache import FeatureCache
from blipq_worker.blip2.vision.preprocessing import Pixels, normalized

log = logging.getLogger(__name__)

Side = Literal["generation", "retrieval"]

#: Takes the images that a pass of the vision tower was for, and its milliseconds.
OnEncode = Callable[[Sequence[Pixels], float], None]

#: An image in a pass: its digest, or itself.
Identity = str | Pixels

# The parts of a vision configuration that its forward pass depends on.
_TOWER = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("image_size", "patch_size", "hidden_act", "layer_norm_eps", "qkv_bias"),
)


#: Of the widest states of a pass on a CPU, in bytes. Larger ones fall out of its caches, and glibc
#: maps each anew (see ``give_large_blocks_back``); a tower gains nothing from more images at once.
_STATES_ON_A_CPU = 8 * 2**20


def split_tower(model: Any) -> None:
    """Takes the last LayerNorm off a vision tower: it is the model's ``last_layernorm`` then.

    It is trained with each checkpoint, where the rest of the tower is frozen: without it the towers
    of the published checkpoints are equal, and so is what they make of an image.
    """
    model.last_layernorm = model.vision_model.post_layernorm
    model.vision_model.post_layernorm = torch.nn.Identity()


def equal_towers(one: Any, other: Any) -> bool:
    """Whether two vision towers are the same, tensor by tensor."""
    if any(getattr(one.config, part) != getattr(other.config, part) for part in _TOWER):
        return False
    left, right = one.state_dict(), other.state_dict()
    return left.keys() == right.keys() and all(
        tensor.dtype == right[name].dtype and torch.equal(tensor, right[name])
        for name, tensor in left.items()
    )


class Vision:
    """How one checkpoint sees images. Not thread-safe.

    model: after ``split_tower``. side: which pixels it takes. tower, queries: names of the outputs
    of tower and Q-Former in the cache; each stands for preprocessing, weights and precision, so
    checkpoints that share a tower share its name. table: see ``Preprocessor``. adapted: the names
    of the queries that adapters of the Q-Former make, by their numbers.
    """

    def __init__(
        self,
        model: Any,
        *,
        side: Side,
        tower: str,
        queries: str,
        table: torch.Tensor,
        cache: FeatureCache,
        adapted: Mapping[int, str] | None = None,
    ) -> None:
        self.model = model
        self.tower = tower
        self.name = queries
        self._adapted = dict(adapted or {})
        self._adapters = rows_of(model)
        self._side = side
        self._cache = cache
        self._table = table.to(model.query_tokens.device)
        self._images_per_pass = _images_per_pass(model)
        self._tower_pass, self._query_pass = CapturedPass(self._see), CapturedPass(self._query)
        #: Called after each pass: many images in a row are no hung tower.
        self.on_step: Callable[[], None] = lambda: None
        #: Called after a pass with the images that waited for it, and its milliseconds.
        self.on_encode: OnEncode = lambda images, ms: None
        # Texts are written about what a tower saw in 16 bits: TF32 is as good as these, and three
        # times as fast as fp32. Matching is decided in full fp32.
        seen = model.vision_model.embeddings.class_embedding.dtype
        self._rounds = side == "generation" and seen != torch.float32

    def needed(self, adapter: int) -> str:
        """The feature, by its name in the cache, that a text to be written needs of its image."""
        return self.name_of(adapter)

    def patches(self, images: Sequence[Pixels]) -> torch.Tensor:
        """The vision tower's output, (B, patches + 1, hidden)."""
        with self._timed([(self.tower, image) for image in images]):
            return self._patches(images)

    def name_of(self, adapter: int) -> str:
        """The name in the cache of the queries that an adapter reads: its own, or everyone's."""
        return self._adapted.get(adapter, self.name)

    def queries(self, images: Sequence[Pixels], adapters: Sequence[int] = ()) -> torch.Tensor:
        """The Q-Former's 32 queries after they have read each image: (B, 32, 768), fp32.

        adapters: of each image; all but those of the Q-Former read the same.
        """
        readers = [each if each in self._adapted else 0 for each in adapters] or [0] * len(images)
        if len(set(readers)) == 1:
            return self._queries(images, readers[0])
        found: list[Any] = [None] * len(images)
        for reader in set(readers):
            at = [index for index, each in enumerate(readers) if each == reader]
            read = self._queries([images[index] for index in at], reader)
            for index, queries in zip(at, read, strict=True):
                found[index] = queries
        return torch.stack(found)

    def _queries(self, images: Sequence[Pixels], adapter: int) -> torch.Tensor:
        name = self.name_of(adapter)
        with self._timed([(name, image) for image in images]):
            return self._each(name, images, partial(self._read, adapter=adapter))

    def _patches(self, images: Sequence[Pixels]) -> torch.Tensor:
        patches: torch.Tensor = self.model.last_layernorm(
            self._each(self.tower, images, self._look)
        )
        return patches

    def _look(self, images: Sequence[Pixels]) -> torch.Tensor:
        pixels = [getattr(image, self._side) for image in images]
        if any(each is None for each in pixels):
            raise ValueError(f"an image came without pixels for the {self._side} checkpoint")
        seen = []
        for each in torch.split(self._stacked(pixels), self._images_per_pass):
            seen.append(self._tower_pass(normalized(each, self._table)))
            self.on_step()
        return torch.cat(seen) if len(seen) > 1 else seen[0]

    def _read(self, images: Sequence[Pixels], adapter: int) -> torch.Tensor:
        patches = self._patches(images)
        if adapter:  # no graph was captured with it
            with self._adapters.listed([adapter] * len(images), patches.device):
                read = self._query(patches)
        else:
            read = self._query_pass(patches)
        self.on_step()
        return read

    def _see(self, pixels: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.model.vision_model(pixels).last_hidden_state
        return hidden

    def _query(self, patches: torch.Tensor) -> torch.Tensor:
        with tf32() if self._rounds else nullcontext():
            return query_features(self.model, patches)

    @torch.inference_mode()
    def capture(self, how: Callable[[Run], Run], most: int) -> None:
        """Has passes over up to ``most`` images run by graphs, where the tower allows it."""
        patches = self._capture_tower(how, most)
        self._query_pass.prepare(patches[0], how, most)
        log.info("vision: %d graphs of queries", len(self._query_pass))

    def _capture_tower(self, how: Callable[[Run], Run], most: int) -> torch.Tensor:
        """The same of the tower alone; what it sees in noise, (1, patches + 1, hidden)."""
        config, started = self.model.config.vision_config, time.monotonic()
        size = 3, config.image_size, config.image_size
        dice = torch.Generator().manual_seed(4)
        pixels = torch.randn(size, generator=dice).to(self.model.query_tokens.device)
        self._tower_pass.prepare(pixels, how, most)
        log.info("vision: %d graphs, %.1f s", len(self._tower_pass), time.monotonic() - started)
        patches: torch.Tensor = self.model.last_layernorm(self._see(pixels[None]))
        return patches

    def _each(
        self,
        name: str,
        images: Sequence[Pixels],
        compute: Callable[[Sequence[Pixels]], torch.Tensor],
    ) -> torch.Tensor:
        """A feature of each image, in order: what is known, and the rest in one pass."""
        known = {identity(image): self._known(name, image) for image in images}
        found = {image: feature for image, feature in known.items() if feature is not None}
        missing = {identity(each): each for each in images if identity(each) not in found}
        if missing:
            found.update(zip(missing, compute(list(missing.values())), strict=True))
        for image in images:
            if self._keeps(name, image):
                self._keep(name, image, found[identity(image)])
        return self._stacked([found[identity(image)] for image in images])

    def _keeps(self, name: str, image: Pixels) -> bool:
        """Whether to remember it: of most images the next job needs less than the tower saw."""
        return name != self.tower or image.whole

    def _known(self, name: str, image: Pixels) -> torch.Tensor | None:
        if name in image.features or image.digest is None:
            return image.features.get(name)
        return self._cache.get(image.digest, name)

    def _keep(self, name: str, image: Pixels, feature: torch.Tensor) -> None:
        if name in image.features:
            return
        known = None if image.digest is None else self._cache.get(image.digest, name)
        # A row of a batch would keep all of the batch's memory: it is copied.
        kept = feature.to("cpu", copy=True) if known is None else known
        image.features[name] = kept
        if image.digest is not None and known is None:
            self._cache.put(image.digest, name, kept)

    def _stacked(self, rows: Sequence[Any]) -> torch.Tensor:
        device = self.model.query_tokens.device
        return torch.stack([row.to(device) for row in rows])

    @contextmanager
    def _timed(self, features: Sequence[tuple[str, Pixels]]) -> Iterator[None]:
        """Reports the time of a pass for the images of which these features were not known: all
        waited for it.
        """
        unknown = (image for name, image in features if self._known(name, image) is None)
        waiting = list(dict.fromkeys(unknown))
        started = time.monotonic()
        yield
        if waiting:
            self.on_encode(waiting, (time.monotonic() - started) * 1000)


@contextmanager
def tf32() -> Iterator[None]:
    """Has GPUs multiply fp32 in TF32; CPUs do not know it."""
    products = torch.backends.cuda.matmul
    before = products.fp32_precision
    products.fp32_precision = "tf32"
    try:
        yield
    finally:
        products.fp32_precision = before


def _images_per_pass(model: Any) -> int:
    """Images that the tower sees at once: all of them on a GPU."""
    config, weight = model.config.vision_config, model.vision_model.embeddings.class_embedding
    if weight.device.type != "cpu":
        return sys.maxsize
    tokens = (config.image_size // config.patch_size) ** 2 + 1
    widest: int = tokens * config.intermediate_size * weight.element_size()
    return max(1, _STATES_ON_A_CPU // widest)


def identity(image: Pixels) -> Identity:
    """Equal for equal files; an image without a digest is equal to itself alone."""
    return image if image.digest is None else image.digest


def query_features(model: Any, images: torch.Tensor) -> torch.Tensor:
    """The Q-Former's 32 queries after they have read each image: (B, 32, 768), fp32."""
    queries: torch.Tensor = model.qformer(
        query_embeds=model.query_tokens.expand(len(images), -1, -1),
        encoder_hidden_states=images,
    ).last_hidden_state
    return queries


def text_features(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """What the Q-Former makes of each token of B texts: (B, tokens, 768), fp32."""
    features: torch.Tensor = model.qformer(
        query_embeds=model.embeddings(input_ids=ids), query_length=0, attention_mask=mask
    ).last_hidden_state
    return features


def pair_features(
    model: Any, images: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """The 32 queries after they have read each image and its text together: (B, 32, 768), fp32."""
    queries = model.query_tokens.expand(len(ids), -1, -1)
    count = queries.shape[1]
    read: torch.Tensor = model.qformer(
        query_embeds=model.embeddings(input_ids=ids, query_embeds=queries),
        query_length=count,
        attention_mask=torch.cat([mask.new_ones(queries.shape[:2]), mask], dim=1),
        encoder_hidden_states=images,
    ).last_hidden_state
    return read[:, :count]
