"""How a front is, for the worker's main process: a small file, replaced at each beat."""

import os
from pathlib import Path

import msgspec


class FrontStatus(msgspec.Struct, frozen=True, kw_only=True):
    """A front's state.

    beat: when it was written, on the clock of ``time.monotonic``, which all processes of a host
    share. threads: jobs that it can hold; active: those that it holds. taking: whether a message
    that comes now is run at once. draining: it takes no more. problems: why it is not ready, by
    what was checked (``redis``, ``s3``, ``broker loop``, ``engine``). live: what is wrong with it
    that only its end would mend. decode_bound: whether the engine waits for its images.
    """

    pid: int
    number: int
    beat: float
    threads: int
    active: int
    taking: bool
    draining: bool
    problems: dict[str, str]
    live: dict[str, str]
    decode_bound: bool = False


_decoder = msgspec.json.Decoder(FrontStatus)


def write_status(path: Path, status: FrontStatus) -> None:
    """Replaces the file, whole. Raises OSError.

    On a disk that is full it is written over: a front whose status grows old would be killed.
    """
    data = msgspec.json.encode(status)
    fresh = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        fresh.write_bytes(data)
        fresh.replace(path)
    except OSError:
        fresh.unlink(missing_ok=True)
        with path.open("r+b") as file:
            # Its block is its own, and JSON may end in spaces. Who reads half of it reads it again.
            file.write(data.ljust(path.stat().st_size))


def read_status(path: Path) -> FrontStatus | None:
    """A front's state; None where there is no such file, or another one."""
    try:
        return _decoder.decode(path.read_bytes())
    except (FileNotFoundError, msgspec.MsgspecError, UnicodeDecodeError):
        return None
