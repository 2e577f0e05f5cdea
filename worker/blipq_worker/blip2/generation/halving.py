"""What does not fit into memory at once may fit in two parts."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

Row = TypeVar("Row")
Answer = TypeVar("Answer")


def by_halves(run: Callable[[Sequence[Row]], list[Answer]], rows: Sequence[Row]) -> list[Answer]:
    """``run(rows)``; halves of them where memory runs out, down to single rows.

    The answers are joined in order. Raises what ``run`` raises, OutOfMemoryError for a single row.
    """
    try:
        return run(rows)
    except torch.OutOfMemoryError:
        if len(rows) == 1:
            raise
    # Not in the handler: there the error would keep the memory of the frames that it came through.
    middle = len(rows) // 2
    return by_halves(run, rows[:middle]) + by_halves(run, rows[middle:])
