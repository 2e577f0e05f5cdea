"""Steps as CUDA graphs: launched as one, where hundreds of kernels cost more than they compute."""

import logging
import time
from collections.abc import Callable

import torch

from blipq_worker.blip2.cuda.capture import CaptureError, Run, first_line
from blipq_worker.blip2.decoding.static.step import Shape, StaticStep

log = logging.getLogger(__name__)


#: Graphs beyond those captured at the start: rare variants, and windows of long sequences.
RARE = 48
#: No token: what a graph that does nothing leaves.
_NOTHING = -2


class Graphs:
    """Takes steps by their graphs; ``capture`` makes them.

    A shape that was not captured is captured when it is first needed, if there are not too many,
    and else taken eagerly.
    """

    def __init__(self, step: StaticStep, capture: Callable[[Run], Run], rare: int = RARE) -> None:
        self._step, self._capture = step, capture
        # None: it could not be captured, and is not tried again.
        self._replays: dict[Shape, Run | None] = {}
        self._left = rare

    def __call__(self, shape: Shape) -> None:
        if shape not in self._replays and self._left > 0:
            self._left -= 1
            self.attempt(shape)
        replay = self._replays.get(shape)
        if replay is None or not self._launched(shape, replay):
            self._step(shape)

    def _launched(self, shape: Shape, replay: Run) -> bool:
        """Launches a graph; False where it cannot be launched: it is not tried again.

        On a device whose context is broken the step without it raises, too.
        """
        try:
            replay()
        except RuntimeError as error:
            self._replays[shape] = None
            log.warning("decoding: %s goes on without its graph: %s", shape, first_line(error))
            return False
        return True

    def __len__(self) -> int:
        return sum(replay is not None for replay in self._replays.values())

    def prepare(self, shape: Shape) -> None:
        """Captures a shape. Raises CaptureError, and whatever capturing raises."""
        self._replays[shape] = self._checked(shape)

    def attempt(self, shape: Shape) -> None:
        """Captures a shape, which else stays without a graph."""
        started = time.monotonic()
        try:
            self.prepare(shape)
        except Exception as error:
            self._replays[shape] = None
            log.warning("decoding: %s stays without a graph: %s", shape, first_line(error))
        else:
            log.info("decoding: a graph for %s, %.1f s", shape, time.monotonic() - started)

    def _checked(self, shape: Shape) -> Run:
        """The graph of a shape, after it has chosen what the step chooses; all stays as it was.

        Steps may be taken again from the same state: keys and values are written as they were.
        """
        step, before, groups = self._step, self._step.state.copy(), self._step.groups.copy()

        def restore() -> None:
            step.state.restore(before)
            step.groups.restore(groups)

        def chosen(run: Run) -> torch.Tensor:
            restore()
            step.chosen.fill_(_NOTHING)
            run()
            return torch.cat([step.chosen[: shape.slots, 0].long(), step.state.tokens])

        def take() -> None:
            step(shape)

        try:
            step.state.live.fill_(False)  # while it is recorded nobody takes a step
            replay = self._capture(take)
            if not torch.equal(chosen(take), chosen(replay)):
                raise CaptureError("its graph chooses other tokens")
        finally:
            restore()
        return replay
