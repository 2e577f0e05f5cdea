"""What OPT and Llama share over static slots: a slot holds a prompt and what follows it."""

from abc import ABC, abstractmethod
from typing import Any

import torch

from blipq_worker.blip2.adapters.layers import rows_of
from blipq_worker.blip2.decoding.languages import Causal
from blipq_worker.blip2.decoding.sequences import Row
from blipq_worker.blip2.decoding.static.attention.caches import KeysAndValues
from blipq_worker.blip2.decoding.static.attention.methods import Attention
from blipq_worker.blip2.decoding.static.state import SlotState


class StaticCausal(ABC):
    """See ``StaticLanguage``. heads, size: of self-attention; layers: how many have it."""

    start: tuple[int, ...] = ()

    def __init__(self, model: Any, growing: Causal, *, layers: int, heads: int, size: int) -> None:
        self.rows = rows_of(model)
        self._growing = growing
        self._count = layers
        self.heads, self.size = heads, size
        embeddings = model.get_input_embeddings().weight
        self.vocabulary: int = embeddings.shape[0]
        self.dtype: torch.dtype = embeddings.dtype
        self.longest: int = model.config.max_position_embeddings
        self._own: KeysAndValues | None = None
        self.columns = self.prompt_columns = 0

    def suits(self, row: Row) -> bool:
        """Whether a slot holds a sequence at its longest."""
        return row.prompt_length + row.params.max_new_tokens - 1 <= self.prompt_columns

    def first_position(self, row: Row) -> int:
        """Where its first new token goes."""
        return row.prompt_length

    def slot_bytes(self, columns: int) -> int:
        """What keys and values of one slot take."""
        return KeysAndValues.bytes_of(self._count, self.heads, columns, self.size, self.dtype)

    def reserve(self, slots: int, columns: int, device: torch.device) -> None:
        """Takes the memory of all slots. Raises OutOfMemoryError, and then has taken none."""
        self._own = KeysAndValues(
            self._count, slots, self.heads, columns, self.size, self.dtype, device
        )
        self.columns = self.prompt_columns = columns

    def release(self) -> None:
        """Gives the memory of all slots back."""
        self._own = None

    @property
    def bytes(self) -> int:
        """What keys and values take."""
        return 0 if self._own is None else self._own.bytes

    def prefill(
        self, queries: torch.Tensor, ids: torch.Tensor, lengths: torch.Tensor
    ) -> tuple[torch.Tensor, Any, torch.Tensor]:
        """Reads prompts by the model; see ``StaticLanguage``."""
        scores, cache = self._growing.read(queries, ids, lengths)
        return scores, cache, lengths - 1

    def put(self, at: torch.Tensor, filled: Any, lengths: torch.Tensor, *, clear: bool) -> None:
        """Puts prefilled sequences into the first of their slots; see ``StaticLanguage``."""
        assert self._own is not None
        if clear:
            self._own.clear(at[:, 1:])
        self._own.put(
            at[:, :1], [(layer.keys, layer.values) for layer in filled.layers], clear=clear
        )

    @abstractmethod
    def step(
        self,
        state: SlotState,
        attention: Attention,
        window: int,
        ancestry: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Scores of the next tokens, (n, vocabulary); see ``StaticLanguage``."""
