"""The ``blipq`` command before anything of it is loaded, which takes a while."""

import os
import signal
from types import FrameType


def _leave(number: int, frame: FrameType | None) -> None:
    os._exit(130)


def main() -> None:
    """An interrupt this early ends the command without a traceback: nothing has begun."""
    signal.signal(signal.SIGINT, _leave)  # before the import, which takes most of the start
    from blipq.cli import main as command

    # Before the command: from here on an interrupt must run its ``finally`` blocks.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    command()


if __name__ == "__main__":
    main()
