"""Recording what a function launches on a GPU."""

import warnings
from collections.abc import Callable

import torch

Run = Callable[[], None]


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


def first_line(error: Exception) -> str:
    """The first line of an error, with its type."""
    return f"{type(error).__name__}: {error}".splitlines()[0]
