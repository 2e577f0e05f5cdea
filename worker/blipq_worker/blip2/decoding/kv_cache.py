"""Keys and values of running rows: row i of every layer's buffer is slot i.

A row's prompt begins in column 0 and its new tokens follow at its own position, so rows of all
lengths run together without gaps. Running rows fill the first slots: what a step attends to is
then a view of the buffers, not a copy.
"""

from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

_ROWS_STEP = 8
_COLUMNS_STEP = 32


class _Layer(CacheLayerMixin):  # type: ignore[misc]  # transformers has no types
    """One layer's buffer: keys and values, (2, slots, heads, columns, head size).

    ``keys`` and ``values`` are what the present step attends to: T5's cross attention reads them.
    """

    is_sliding = False

    def __init__(self) -> None:
        super().__init__()
        self.is_initialized = True
        self.buffer: torch.Tensor | None = None

    def grow(self, like: torch.Tensor, rows: int, columns: int) -> None:
        """Makes a buffer of this size for keys ``like`` these; keeps what fits."""
        # Zeros: what a mask hides is still multiplied by nothing, and rubbish may survive that.
        grown = like.new_zeros((2, rows, like.shape[1], columns, like.shape[3]))
        if self.buffer is not None:
            old = self.buffer[:, :rows, :, :columns]
            grown[:, : old.shape[1], :, : old.shape[3]] = old
        self.buffer = grown

    def look(self, slots: slice | torch.Tensor, positions: torch.Tensor, length: int) -> None:
        """Begins a step of the rows in ``slots``: over ``length`` columns, writing at positions."""
        assert self.buffer is not None
        self._slots, self._positions, self._length = slots, positions, length
        self.keys, self.values = self.buffer[:, slots, :, :length]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Stores the states of one new token per row; returns what the rows attend to."""
        slots = self._slots
        if isinstance(slots, slice):
            slots = torch.arange(slots.stop, device=self._positions.device)
        assert self.buffer is not None
        for buffer, states in zip(self.buffer, (key_states, value_states), strict=True):
            buffer[slots, :, self._positions] = states[:, :, 0]
        self.look(self._slots, self._positions, self._length)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        """Columns of the present step."""
        return self._length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Unused: steps bring their own masks."""
        return self._length, 0

    def get_max_length(self) -> int:
        """No limit of its own."""
        return -1

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing: ``grow`` does it."""


class Slots:
    """The buffers of one kind of attention in all layers. Grows with the rows that it holds."""

    def __init__(self, layers: int) -> None:
        self.cache = Cache(layers=[_Layer() for _ in range(layers)])

    @property
    def buffers(self) -> list[torch.Tensor]:
        """Each layer's keys and values, (2, slots, heads, columns, head size)."""
        return [layer.buffer for layer in self.cache.layers if layer.buffer is not None]

    @property
    def bytes(self) -> int:
        """Bytes of all buffers."""
        return sum(buffer.nbytes for buffer in self.buffers)

    @property
    def columns(self) -> int:
        """Columns of a slot. Layers differ where memory ran out as they grew: of the smallest."""
        return min(buffer.shape[3] for buffer in self.buffers)

    @property
    def dtype(self) -> torch.dtype:
        """The type of keys and values."""
        return self.buffers[0].dtype

    def put(self, running: int, filled: Cache, part: slice, columns: int) -> None:
        """Puts newly filled rows, a part of what was filled, behind the ``running`` first ones.

        columns: the most that any of all these rows will need.
        """
        for layer, source in zip(self.cache.layers, filled.layers, strict=True):
            keys, values = source.keys[part], source.values[part]
            end, width = running + len(keys), keys.shape[2]
            columns = max(columns, width)  # prompts of other rows may be longer
            if layer.buffer is None or not _holds(layer.buffer, end, columns):
                layer.grow(keys, round_up(end, _ROWS_STEP), round_up(columns, _COLUMNS_STEP))
            for buffer, new in zip(layer.buffer, (keys, values), strict=True):
                buffer[running:end, :, :width] = new
                buffer[running:end, :, width:] = 0  # nothing is left of who was here before

    def move(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copies rows to other slots."""
        device = self.buffers[0].device
        taken, put = (torch.tensor(each, device=device) for each in (sources, targets))
        for buffer in self.buffers:
            buffer[:, put] = buffer[:, taken]

    def look(self, slots: slice | torch.Tensor, positions: torch.Tensor, length: int) -> None:
        """Begins a step in all layers."""
        for layer in self.cache.layers:
            layer.look(slots, positions, length)

    def clear(self) -> None:
        """Gives the memory back; there must be no rows."""
        for layer in self.cache.layers:
            layer.buffer, layer.keys, layer.values = None, None, None


def _holds(buffer: torch.Tensor, rows: int, columns: int) -> bool:
    return buffer.shape[1] >= rows and buffer.shape[3] >= columns


def round_up(number: int, step: int) -> int:
    """The next multiple of ``step``."""
    return -(-number // step) * step
