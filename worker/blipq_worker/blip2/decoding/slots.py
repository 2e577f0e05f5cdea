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
_COLUMNS_STEP = 64


class _Layer(CacheLayerMixin):  # type: ignore[misc]  # transformers has no types
    """One layer's buffers, (slots, heads, columns, head size).

    ``keys`` and ``values`` are what the present step attends to: T5's cross attention reads them.
    """

    is_sliding = False

    def __init__(self) -> None:
        super().__init__()
        self.is_initialized = True
        self.buffers: list[torch.Tensor] = []

    def grow(self, like: tuple[torch.Tensor, torch.Tensor], rows: int, columns: int) -> None:
        """Makes buffers of this size for states ``like`` these; keeps what fits."""
        grown = []
        for index, states in enumerate(like):
            # Zeros: what a mask hides is still multiplied by nothing, and rubbish may survive that.
            new = states.new_zeros((rows, states.shape[1], columns, states.shape[3]))
            if self.buffers:
                old = self.buffers[index][:rows, :, :columns]
                new[: old.shape[0], :, : old.shape[2]] = old
            grown.append(new)
        self.buffers = grown

    def look(self, slots: slice | torch.Tensor, positions: torch.Tensor, length: int) -> None:
        """Begins a step of the rows in ``slots``: over ``length`` columns, writing at positions."""
        self._slots, self._positions, self._length = slots, positions, length
        self.keys, self.values = (buffer[slots, :, :length] for buffer in self.buffers)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Stores the states of one new token per row; returns what the rows attend to."""
        slots = self._slots
        if isinstance(slots, slice):
            slots = torch.arange(slots.stop, device=self._positions.device)
        for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
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
    def bytes(self) -> int:
        """What the buffers take."""
        return sum(buffer.nbytes for layer in self.cache.layers for buffer in layer.buffers)

    @property
    def dtype(self) -> torch.dtype:
        """The type of keys and values."""
        dtype: torch.dtype = self.cache.layers[0].buffers[0].dtype
        return dtype

    def put(self, running: int, filled: Cache, columns: int) -> None:
        """Puts newly filled rows behind the ``running`` first ones.

        columns: the most that any of all these rows will need.
        """
        for layer, source in zip(self.cache.layers, filled.layers, strict=True):
            states = source.keys, source.values
            end, width = running + len(states[0]), states[0].shape[2]
            if not layer.buffers or not _holds(layer.buffers[0], end, columns):
                layer.grow(states, _up(end, _ROWS_STEP), _up(columns, _COLUMNS_STEP))
            for buffer, new in zip(layer.buffers, states, strict=True):
                buffer[running:end, :, :width] = new
                buffer[running:end, :, width:] = 0  # nothing is left of who was here before

    def move(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copies rows to other slots."""
        for layer in self.cache.layers:
            for buffer in layer.buffers:
                buffer[list(targets)] = buffer[list(sources)]

    def look(self, slots: slice | torch.Tensor, positions: torch.Tensor, length: int) -> None:
        """Begins a step in all layers."""
        for layer in self.cache.layers:
            layer.look(slots, positions, length)

    def clear(self) -> None:
        """Gives the memory back; there must be no rows."""
        for layer in self.cache.layers:
            layer.buffers, layer.keys, layer.values = [], None, None


def _holds(buffer: torch.Tensor, rows: int, columns: int) -> bool:
    return buffer.shape[0] >= rows and buffer.shape[2] >= columns


def _up(number: int, step: int) -> int:
    """The next multiple of ``step``."""
    return -(-number // step) * step
