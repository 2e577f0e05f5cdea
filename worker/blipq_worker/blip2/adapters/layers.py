"""A layer with the adapters of several rows: one product with all of them, of which each row keeps
its own part.

The ranks of all adapters lie side by side, so that adapters of different ranks, and rows without
one, take two products whatever there is in a pass. Nothing is gathered by row and nothing comes
from the host: a CUDA graph that reads the rows' numbers runs with any of them.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch


class Rows:
    """Which adapter each row of a pass has: 0 for none, else its number. Of one thread.

    One for a model and all of its adapted layers. Outside of a pass with numbers, layers compute
    what they do without adapters. loaded: whether there are such layers.
    """

    def __init__(self, *, loaded: bool) -> None:
        self.loaded = loaded
        self._numbers: torch.Tensor | None = None
        self._layouts: dict[tuple[int, ...], torch.Tensor] = {}
        self._others: dict[int, torch.Tensor] = {}

    def of(self, numbers: torch.Tensor) -> AbstractContextManager[None]:
        """A pass whose rows have these adapters, (rows,), whole numbers on the model's device."""
        return self._pass(numbers) if self.loaded else nullcontext()

    def listed(
        self, numbers: Sequence[int], device: torch.device | str
    ) -> AbstractContextManager[None]:
        """The same of numbers on the host."""
        if not self.loaded or not any(numbers):
            return nullcontext()
        return self._pass(torch.tensor(numbers, dtype=torch.long, device=device))

    @contextmanager
    def _pass(self, numbers: torch.Tensor) -> Iterator[None]:
        before = self._numbers, self._others
        self._numbers, self._others = numbers, {}
        try:
            yield
        finally:
            self._numbers, self._others = before

    def layout(self, owners: Sequence[int], device: torch.device) -> torch.Tensor:
        """Which adapter each rank belongs to, (ranks,): one tensor for all layers that agree."""
        key = tuple(owners)
        if key not in self._layouts:
            self._layouts[key] = torch.tensor(key, dtype=torch.long, device=device)
        return self._layouts[key]

    def others(self, owners: torch.Tensor) -> torch.Tensor | None:
        """Which ranks are not a row's own, (rows, ranks); None outside of a pass with numbers."""
        if self._numbers is None:
            return None
        # Computed once for all layers of a layout. `layout` keeps the tensor, and so its id.
        found = self._others.get(id(owners))
        if found is None:
            found = self._others[id(owners)] = self._numbers[:, None] != owners
        return found


#: Of models without adapters.
NOBODY = Rows(loaded=False)


def rows_of(model: Any) -> Rows:
    """Those of a model or its language model."""
    found: Rows = getattr(model, "adapter_rows", NOBODY)
    return found


class LowRank(torch.nn.Module):
    """What all adapters of a layer add, with their scales.

    down: (ranks, in). up: (ranks, out). owners: see ``Rows.layout``. Both become layers, which
    ``loading.packing`` may replace.
    """

    def __init__(
        self, down: torch.Tensor, up: torch.Tensor, owners: Sequence[int], rows: Rows
    ) -> None:
        super().__init__()
        self.down, self.up = _linear(down), _linear(up.T)
        self.owners, self.rows = tuple(owners), rows
        self._layout = rows.layout(self.owners, down.device)

    @property
    def is_plain(self) -> bool:
        """Whether its numbers are where PyTorch's own layers have them."""
        return type(self.down) is type(self.up) is torch.nn.Linear

    def forward(self, out: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        """``out``, (..., out), and what each row's own adapter makes of states, (..., in).

        Rows come first in both, alone or with all of their tokens behind each other.
        """
        others = self.rows.others(self._layout)
        if others is None:
            return out
        flat = states.reshape(-1, states.shape[-1]).to(self.down.weight.dtype)
        lowered = self.down(flat)
        # Not a product with zeros: what overflows in another adapter is not this row's.
        by_row = lowered.view(len(others), -1, lowered.shape[-1])
        own = by_row.masked_fill(others[:, None], 0.0).view_as(lowered)
        if self.is_plain and out.dtype == self.up.weight.dtype:  # one kernel for two
            added = torch.addmm(out.reshape(-1, out.shape[-1]), own, self.up.weight.T)
            return added.view(out.shape)
        apart: torch.Tensor = self.up(own)
        return out + apart.to(out.dtype).view(out.shape)

    @classmethod
    def joined(cls, parts: Sequence["LowRank | None"], widths: Sequence[int]) -> "LowRank":
        """The same beside layers that read the same states, with their outputs side by side.

        widths: of these outputs. The parts become views of it, so that nothing is held twice.
        """
        there = [part for part in parts if part is not None]
        down = torch.cat([part.down.weight.data for part in there])
        up = down.new_zeros((len(down), sum(widths)))
        row = column = 0
        for part, width in zip(parts, widths, strict=True):
            if part is not None:
                rows = slice(row, row + len(part.owners))
                up[rows, column : column + width] = part.up.weight.T
                part.down.weight.data = down[rows]
                part.up.weight.data = up[rows, column : column + width].T
                row = rows.stop
            column += width
        owners = [owner for part in there for owner in part.owners]
        return cls(down, up, owners, there[0].rows)


def _linear(weight: torch.Tensor) -> torch.nn.Linear:
    """A layer with this weight, (out, in), and no bias."""
    wide, narrow = weight.shape
    layer = torch.nn.Linear(narrow, wide, bias=False, device="meta")
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    return layer


class AdaptedLinear(torch.nn.Module):
    """A linear layer of any precision, and the adapters beside it."""

    def __init__(self, base: Any, low: LowRank) -> None:
        super().__init__()
        self.base, self.low = base, low

    @property
    def weight(self) -> Any:
        """The layer's own."""
        return self.base.weight

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """(..., in) to (..., out)."""
        found: torch.Tensor = self.low(self.base(states), states)
        return found


def parts_of(linear: Any) -> tuple[Any, LowRank | None]:
    """A layer's own, and what its adapters add, if it has some."""
    return (linear.base, linear.low) if isinstance(linear, AdaptedLinear) else (linear, None)
