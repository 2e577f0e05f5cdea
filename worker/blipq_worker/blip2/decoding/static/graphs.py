"""Steps as CUDA graphs: launched as one, where hundreds of kernels cost more than they compute."""

import logging
import time
import warnings
from collections.abc import Callable

import torch

from blipq_worker.blip2.decoding.static.step import Shape, StaticStep

log = logging.getLogger(__name__)

Run = Callable[[], None]

#: Graphs beyond those captured at the start: rare variants, and windows of long sequences.
RARE = 48
#: No token: what a graph that does nothing leaves.
_NOTHING = -2


class CaptureError(RuntimeError):
    """A step cannot be captured, or its graph does not do what the step does."""


class CudaCapture:
    """Records what a function launches; all recordings share one pool of memory.

    They may, as they are replayed one after the other and leave nothing in it.
    """

    def __init__(self) -> None:
        # Said where a mode is set in which waiting is an error: see ``_without_waiting``.
        warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype", UserWarning)
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Run) -> Run:
        """Runs it twice, records it, and returns what launches the recording.

        The runs before have kernels compiled and libraries choose theirs, which a recording cannot.
        """
        now = torch.cuda.current_stream()
        self._stream.wait_stream(now)
        with torch.cuda.stream(self._stream):
            run()
            _without_waiting(run)
        now.wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads may allocate meanwhile.
            with torch.cuda.graph(
                graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
            ):
                run()
        except BaseException:
            # A pool that a recording broke off in cannot be recorded into again.
            self._pool = torch.cuda.graph_pool_handle()
            raise
        return graph.replay


def _without_waiting(run: Run) -> None:
    """Raises RuntimeError where it waits for the device: breaking off a recording leaves traces."""
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode(mode)


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
        """Takes a step."""
        if shape not in self._replays and self._left > 0:
            self._left -= 1
            self.attempt(shape)
        replay = self._replays.get(shape)
        if replay is None:
            self._step(shape)
        else:
            replay()

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
        step, before = self._step, self._step.state.copy()

        def chosen(run: Run) -> torch.Tensor:
            step.state.restore(before)
            step.chosen.fill_(_NOTHING)
            run()
            return step.chosen[: shape.slots].clone()

        def take() -> None:
            step(shape)

        try:
            step.state.live.fill_(False)  # while it is recorded nobody takes a step
            replay = self._capture(take)
            if not torch.equal(chosen(take), chosen(replay)):
                raise CaptureError("its graph chooses other tokens")
        finally:
            step.state.restore(before)
        return replay


def first_line(error: Exception) -> str:
    """What it says, in a line."""
    return f"{type(error).__name__}: {error}".splitlines()[0]
