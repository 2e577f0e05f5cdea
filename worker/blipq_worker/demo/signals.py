"""Ctrl-C and its kin, in a way that nothing they interrupt can lose."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(BaseException):
    """A signal came. No Exception: nothing on the way may handle it."""

    def __init__(self, number: int) -> None:
        self.number = number


class Signals:
    """Raises Interrupted in the main thread when a signal comes.

    The signal is also remembered, for ``check``: what is raised inside a destructor or a weak
    reference's callback is lost.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._held = False

    def watch(self) -> None:
        """From here on signals interrupt, except those that the parent had us ignore (nohup)."""
        for number in SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._on_signal)

    def check(self) -> None:
        """Raises Interrupted if a signal came."""
        if self.number is not None:
            raise Interrupted(self.number)

    @contextmanager
    def held(self) -> Iterator[None]:
        """The first signal waits for the end of the block, so that nothing is half started."""
        self._held = True
        try:
            yield
        finally:
            self._held = False
        self.check()

    @staticmethod
    def ignore() -> None:
        """From here on there is only tidying up, which is short."""
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        waits = self._held and self.number is None
        self.number = number  # before the exception, which may be lost (see above)
        if not waits:
            raise Interrupted(number)
