"""How the engine is started again: what is its own fault, and what is not."""

import signal
from collections.abc import Iterator

import pytest

from blipq_worker.supervision.engine import EngineProcess
from blipq_worker.supervision.folder import RunFolder


class Ended:
    """A service whose process has ended, and is started again."""

    pid = 4711

    def __init__(self, code: int) -> None:
        self.exit_code = code

    def revive(self) -> bool:
        return True

    def stop(self, timeout: float) -> None:
        pass


@pytest.fixture
def folder() -> Iterator[RunFolder]:
    folder = RunFolder()
    yield folder
    folder.remove()


@pytest.mark.parametrize(("code", "is_blamed"), [(-signal.SIGKILL, False), (-signal.SIGSEGV, True)])
def test_an_engine_that_was_killed_from_outside_keeps_its_graphs(
    folder: RunFolder, code: int, is_blamed: bool
) -> None:
    """Graphs do not send signal 9; the kernel does, where memory is short, and so do people."""
    folder.trial.touch()
    engine = EngineProcess(Ended(code), folder, watchdog_s=30)  # type: ignore[arg-type]
    try:
        assert engine.look() is None
    finally:
        engine.stop(0)
    assert folder.trial.exists() is is_blamed
