"""What the rows of a step see: attention to the keys and values in their slots.

All rows of a step pass the linear layers together; only their attention is apart. A sequence alone
is a row with a slot of its own. The beams of a prompt are k rows that share a slot: each writes its
token into a column of its own, and a mask shows each of them the prompt and its own line of tokens.
So nothing is copied when a beam goes on from another one, and what they share is read once.
"""

from collections.abc import Sequence
from typing import Protocol

import torch

from blipq_worker.blip2.decoding.kv_cache import round_up
from blipq_worker.blip2.loading.attention import NextTokenAttention

#: Columns that a step reads are a multiple of this: vectors without a rest.
COLUMNS = 16

#: Slots of a step: the first ones, or some.
Where = slice | torch.Tensor


class View(Protocol):
    """Rows of a step that attend alike.

    own: stores keys and values of the new tokens, and attends with them. cross: attends to what
    T5's encoder read. All but what comes back, (rows, heads x size), is (rows, heads, size).
    """

    count: int

    def own(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor: ...

    def cross(self, layer: int, query: torch.Tensor) -> torch.Tensor: ...


class Places:
    """Where a step reads: slots of buffers, (2, slots, heads, columns, size) in each layer.

    bias: what is added to scores, (slots, 1 or heads, 1 or beams, columns); it hides columns.
    """

    def __init__(
        self,
        buffers: Sequence[torch.Tensor],
        where: Where,
        bias: torch.Tensor,
        attend: NextTokenAttention,
    ) -> None:
        self.buffers, self._where, self._bias, self._attend = buffers, where, bias, attend

    def __call__(self, layer: int, query: torch.Tensor) -> torch.Tensor:
        """(slots, heads, beams, size) to (slots, beams, heads, size)."""
        keys, values = self.buffers[layer]
        width = self._bias.shape[-1]
        return self._attend(
            query, _part(keys, self._where, width), _part(values, self._where, width), self._bias
        )


def _part(states: torch.Tensor, where: Where, width: int) -> torch.Tensor:
    """The first columns of some slots; a view of all of them as far as that can be."""
    return states[where] if width == states.shape[2] else states[where, :, :width]


def width_of(longest: int, columns: int) -> int:
    """How many of the columns a step reads: all, where a copy of some would cost as much."""
    width = round_up(longest, COLUMNS)
    return columns if columns < 1.4 * width else width


class Alone:
    """Sequences with a slot each. slots, columns: (rows,), where the new tokens go."""

    def __init__(
        self, own: Places, slots: torch.Tensor, columns: torch.Tensor, cross: Places | None = None
    ) -> None:
        self.count = len(slots)
        self._own, self._slots, self._columns, self._cross = own, slots, columns, cross

    def own(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        keys, values = self._own.buffers[layer]
        keys[self._slots, :, self._columns] = key
        values[self._slots, :, self._columns] = value
        return self._own(layer, query[:, :, None]).reshape(self.count, -1)

    def cross(self, layer: int, query: torch.Tensor) -> torch.Tensor:
        assert self._cross is not None
        return self._cross(layer, query[:, :, None]).reshape(self.count, -1)


class Together:
    """Beams that share slots. slots, columns: (rows,), where the new tokens go.

    lanes: the rows of each slot, (slots, most beams), any row for what is no beam; None where all
    slots have the same number of them, in order. row: where in the lanes each row is, (rows,).
    """

    def __init__(
        self,
        own: Places,
        slots: torch.Tensor,
        columns: torch.Tensor,
        lanes: torch.Tensor,
        row: torch.Tensor | None,
        cross: Places | None = None,
    ) -> None:
        self.count = len(slots)
        self._own, self._slots, self._columns, self._cross = own, slots, columns, cross
        self._lanes, self._row = lanes, row

    def own(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        keys, values = self._own.buffers[layer]
        keys[self._slots, :, self._columns] = key
        values[self._slots, :, self._columns] = value
        return self._attended(self._own, layer, query)

    def cross(self, layer: int, query: torch.Tensor) -> torch.Tensor:
        assert self._cross is not None
        return self._attended(self._cross, layer, query)

    def _attended(self, places: Places, layer: int, query: torch.Tensor) -> torch.Tensor:
        if self._row is None:
            query = query.view(*self._lanes.shape, *query.shape[1:])
        else:
            query = query[self._lanes]
        attended = places(layer, query.transpose(1, 2))
        attended = attended.reshape(self._lanes.numel(), -1)
        return attended if self._row is None else attended[self._row]


def through(
    views: Sequence[View],
    layer: int,
    query: torch.Tensor,
    key: torch.Tensor | None = None,
    value: torch.Tensor | None = None,
) -> torch.Tensor:
    """What all rows of a step attend to, (rows, heads x size); without keys and values: cross."""
    found, begin = [], 0
    for view in views:
        rows = slice(begin, begin + view.count)
        begin = rows.stop
        if key is None or value is None:
            found.append(view.cross(layer, query[rows]))
        else:
            found.append(view.own(layer, query[rows], key[rows], value[rows]))
    return found[0] if len(found) == 1 else torch.cat(found)
