"""One step of all slots up to a number: forward pass, choice, writing. Eagerly or as a graph."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, Protocol

import torch

from blipq_worker.blip2.adapters.layers import Rows
from blipq_worker.blip2.decoding.sequences import Row
from blipq_worker.blip2.decoding.static.attention.methods import Attention
from blipq_worker.blip2.decoding.static.groups import SlotGroups
from blipq_worker.blip2.decoding.static.sampler import Sampler, Variant
from blipq_worker.blip2.decoding.static.state import SlotState


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Makes a GPU the current one."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


class StaticLanguage(Protocol):
    """A language model over static slots: its forward passes, and the memory of its sequences.

    start: what penalties count as written before a first token. heads, size: of self-attention.
    longest: the most columns that make sense. columns: of a slot in self-attention. prompt_columns:
    what a prompt may take of a slot, its queries included. rows: of its adapters.
    """

    start: tuple[int, ...]
    vocabulary: int
    dtype: torch.dtype
    heads: int
    size: int
    longest: int
    columns: int
    prompt_columns: int
    rows: Rows

    def suits(self, row: Row) -> bool:
        """Whether a slot holds a sequence at its longest."""

    def first_position(self, row: Row) -> int:
        """Where its first new token goes, once a step reads it."""

    def slot_bytes(self, columns: int) -> int:
        """What keys and values of one slot take."""

    def reserve(self, slots: int, columns: int, device: torch.device) -> None:
        """Takes the memory of all slots. Raises OutOfMemoryError, and then has taken none."""

    def release(self) -> None:
        """Gives the memory of all slots back."""

    @property
    def bytes(self) -> int:
        """What keys and values take."""

    def prefill(
        self, queries: torch.Tensor, ids: torch.Tensor, lengths: torch.Tensor
    ) -> tuple[torch.Tensor, Any, torch.Tensor]:
        """Reads prompts: queries (n, 32, hidden), ids (n, longest), lengths (n,) of both together.

        Returns scores, (n, vocabulary), what ``put`` takes, and the positions before those of the
        first new tokens, (n,).
        """

    def put(self, at: torch.Tensor, filled: Any, lengths: torch.Tensor, *, clear: bool) -> None:
        """Puts prefilled sequences into slots. at: (n, beams), the first has what all of them see.

        clear: see ``KeysAndValues``.
        """

    def step(
        self,
        state: SlotState,
        attention: Attention,
        window: int,
        ancestry: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Scores of the next tokens, (n, vocabulary).

        window: more than the highest position. ancestry: see ``Attention.prepare``.
        """


class Shape(NamedTuple):
    """What is fixed in a step. slots: the bucket. window: columns that attention looks at."""

    slots: int
    window: int
    variant: Variant


class StaticStep:
    """Takes a step eagerly. Nothing comes from the host, and nothing is waited for.

    chosen: what the last step chose, as ``Sampler.write`` returns it, (slots, 2). groups: of the
    beams in the slots.
    """

    def __init__(
        self, language: StaticLanguage, sampler: Sampler, state: SlotState, attention: Attention
    ) -> None:
        self.language, self.sampler, self.state = language, sampler, state
        self.attention = attention
        slots, columns = state.history.shape
        self.groups = SlotGroups.empty(slots, columns, state.tokens.device)
        self.chosen = torch.zeros((slots, 2), dtype=torch.float64, device=state.tokens.device)

    def __call__(self, shape: Shape) -> None:
        """One more token for every live sequence in the first slots."""
        state, groups, ancestry = self.state.first(shape.slots), None, None
        if shape.variant.beams:
            groups = self.groups.first(shape.slots, shape.variant.beams)
            ancestry = groups.ancestry
        with self.language.rows.of(state.adapter):
            scores = self.language.step(state, self.attention, shape.window, ancestry)
        chosen = self.sampler.write(scores, state, shape.variant, groups)
        self.chosen[: shape.slots].copy_(chosen)

    @property
    def bytes(self) -> int:
        """What slots take, beside keys and values."""
        return self.state.bytes + self.groups.bytes

    def release(self, at: torch.Tensor) -> None:
        """Makes the slots ``at`` idle."""
        self.state.release(at)
        self.groups.release(at)
