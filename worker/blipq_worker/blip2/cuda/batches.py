"""Passes over batches as CUDA graphs: one launch instead of hundreds, for which the GIL is
needed and, beside a worker's other threads, waited for.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch

from blipq_worker.blip2.cuda.capture import Run, first_line

log = logging.getLogger(__name__)

Pass = Callable[[torch.Tensor], torch.Tensor]

#: Rows of a graph; batches between them are filled up with rows that nobody looks at.
SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
#: How far a graph's numbers may be from the pass's own, by the largest of them: its rows are more.
_TOLERANCE = 0.02


@dataclass(frozen=True, slots=True)
class _Recorded:
    batch: torch.Tensor
    out: torch.Tensor
    replay: Run


class CapturedPass:
    """Runs a pass whose rows are independent of each other by the graph of the next size.

    The pass itself runs sizes that cannot be captured, larger batches, and calls outside of
    inference mode, as what graphs read belongs to it.
    """

    def __init__(self, run: Pass) -> None:
        self._run = run
        self._recorded: dict[int, _Recorded] = {}

    def __len__(self) -> int:
        return len(self._recorded)

    def prepare(self, row: torch.Tensor, capture: Callable[[Run], Run], most: int) -> None:
        """Captures it for batches of rows like this one, up to ``most``; gives up at an error."""
        for size in reversed([each for each in SIZES if each <= most]):
            try:
                self._recorded[size] = self._record(row.expand(size, *row.shape), capture)
            except torch.OutOfMemoryError:
                continue  # a smaller one may fit
            except Exception as error:
                log.warning("no graphs of %d rows and fewer: %s", size, first_line(error))
                return

    def _record(self, rows: torch.Tensor, capture: Callable[[Run], Run]) -> _Recorded:
        batch = rows.clone()
        expected = self._run(batch)
        out = torch.zeros_like(expected)

        def run() -> None:
            out.copy_(self._run(batch))

        replay = capture(run)
        out.zero_()
        replay()
        apart = (out - expected).abs().max()
        if not bool(apart <= _TOLERANCE * expected.abs().max()):
            raise RuntimeError("a graph finds other numbers")
        return _Recorded(batch, out, replay)

    def __call__(self, batch: torch.Tensor) -> torch.Tensor:
        """The pass's output, in memory of its own."""
        count = len(batch)
        size = next((each for each in SIZES if each >= count), 0)
        recorded = self._recorded.get(size)
        if recorded is None or not torch.is_inference_mode_enabled():
            return self._run(batch)
        recorded.batch[:count].copy_(batch)
        try:
            recorded.replay()
        except RuntimeError as error:
            del self._recorded[size]
            log.warning("passes of %d rows go on without their graph: %s", size, first_line(error))
            return self._run(batch)
        return recorded.out[:count].clone()
