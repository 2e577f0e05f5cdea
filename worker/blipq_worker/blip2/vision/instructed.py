"""From images and prompts to queries, where the Q-Former reads both: InstructBLIP.

What the tower sees does not depend on the prompt, so it is kept for the next one; queries are kept
for each prompt. Dai et al., InstructBLIP, arXiv 2305.06500.
"""

import hashlib
from array import array
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch

from blipq_worker.blip2.cuda.capture import Run
from blipq_worker.blip2.text.padding import padded
from blipq_worker.blip2.vision.features import Identity, Vision, identity, tf32
from blipq_worker.blip2.vision.preprocessing import Pixels

#: A prompt as ``Instructions`` has it.
Ids = tuple[int, ...]

#: Pairs of an image and a prompt that are read at once.
_PAIRS_AT_ONCE = 64
_PAD = 0


class _Pair(NamedTuple):
    """An image and a prompt, and the name of their queries."""

    name: str
    image: Pixels
    ids: Ids

    @property
    def key(self) -> tuple[str, Identity]:
        """Equal for what has equal queries."""
        return self.name, identity(self.image)


class InstructedVision(Vision):
    """How an InstructBLIP sees images. Not thread-safe. See ``Vision``."""

    def needed(self, adapter: int) -> str:
        """What must be known of an image whose prompt is not."""
        return self.tower

    def instructed(self, images: Sequence[Pixels], prompts: Sequence[Ids]) -> torch.Tensor:
        """The 32 queries after they have read each image and its prompt: (pairs, 32, 768), fp32."""
        pairs = [
            _Pair(self._named(ids), image, ids) for image, ids in zip(images, prompts, strict=True)
        ]
        known = {pair.key: self._known(pair.name, pair.image) for pair in pairs}
        found = {key: queries for key, queries in known.items() if queries is not None}
        missing = {pair.key: pair for pair in pairs if pair.key not in found}
        found.update(zip(missing, self._read_pairs(list(missing.values())), strict=True))
        for pair in pairs:
            self._keep(pair.name, pair.image, found[pair.key])
        return self._stacked([found[pair.key] for pair in pairs])

    def _named(self, ids: Ids) -> str:
        """The name of queries that have read a prompt, in the cache."""
        digest = hashlib.blake2b(array("q", ids).tobytes(), digest_size=16)
        return f"{self.name}/{digest.hexdigest()}"

    def _keeps(self, name: str, image: Pixels) -> bool:
        return True

    def _read_pairs(self, pairs: Sequence[_Pair]) -> list[torch.Tensor]:
        """One pass of the tower over the images, whatever number of prompts each has."""
        if not pairs:
            return []
        images = {identity(pair.image): pair.image for pair in pairs}
        places = {key: place for place, key in enumerate(images)}
        patches = self.patches(list(images.values()))
        read: list[torch.Tensor] = []
        for start in range(0, len(pairs), _PAIRS_AT_ONCE):
            some = pairs[start : start + _PAIRS_AT_ONCE]
            at = torch.tensor([places[identity(pair.image)] for pair in some])
            ids, mask = padded([pair.ids for pair in some], _PAD, patches.device)
            with tf32() if self._rounds else nullcontext():
                queries = instructed_features(self.model, patches[at.to(patches.device)], ids, mask)
            read.extend(queries.unbind())
            self.on_step()
        return read

    @torch.inference_mode()
    def capture(self, how: Callable[[Run], Run], most: int) -> None:
        """Has passes of the tower over up to ``most`` images run by graphs."""
        self._capture_tower(how, most)


def instructed_features(
    model: Any, images: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """The 32 queries after they have read each image and its prompt: (B, 32, 768), fp32.

    This Q-Former, unlike BLIP-2's, takes images in its own precision alone.
    """
    queries = model.query_tokens.expand(len(ids), -1, -1)
    count = queries.shape[1]
    read: torch.Tensor = model.qformer(
        input_ids=ids,
        attention_mask=torch.cat([mask.new_ones(queries.shape[:2]), mask], dim=1),
        query_embeds=queries,
        encoder_hidden_states=images.to(queries.dtype),
    ).last_hidden_state
    return read[:, :count]
