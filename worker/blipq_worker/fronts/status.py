"""How a front is, for the worker's main process: a small file, written over at each beat."""

import os
import zlib
from pathlib import Path
from struct import Struct
from typing import Annotated

import msgspec

from blipq_worker.fronts.files import opened, read

#: Of the file. It is made whole, so that a disk which is full later keeps no front from writing:
#: one whose status grows old would be killed.
ROOM = 32 * 1024
#: Of each problem, in characters; there are few of them.
_LONGEST = 500
_HEAD = Struct("<IH")  # checksum and length
#: A writer is in the file for some microseconds.
_TRIES = 5

_Count = Annotated[int, msgspec.Meta(ge=0, lt=2**31)]


class FrontStatus(msgspec.Struct, frozen=True, kw_only=True):
    """A front's state.

    beat: when it was written, on the clock of ``time.monotonic``, which all processes of a host
    share. threads: jobs that it can hold; active: those that it holds. taking: whether a message
    that comes now is run at once. draining: it takes no more. problems: why it is not ready, by
    what was checked (``redis``, ``s3``, ``broker loop``, ``engine``). live: what is wrong with it
    that only its end would mend. decode_bound: whether the engine waits for its images.
    """

    pid: _Count
    number: _Count
    beat: float
    threads: _Count
    active: _Count
    taking: bool
    draining: bool
    problems: dict[str, str]
    live: dict[str, str]
    decode_bound: bool = False


_decoder = msgspec.json.Decoder(FrontStatus)


def write_status(path: Path, status: FrontStatus) -> None:
    """Writes over the file, with the beginning of a problem that is long. Raises OSError."""
    short = msgspec.structs.replace(
        status, problems=_shortened(status.problems), live=_shortened(status.live)
    )
    data = msgspec.json.encode(short)
    file = opened(path)
    try:
        os.pwrite(file, _HEAD.pack(zlib.crc32(data), len(data)) + data, 0)
    finally:
        os.close(file)


def read_status(path: Path) -> FrontStatus | None:
    """A front's state; None where there is none in the file, or something else."""
    for _ in range(_TRIES):
        data = read(path, ROOM)
        if data is None or len(data) < _HEAD.size:
            return None
        checksum, length = _HEAD.unpack_from(data)
        content = data[_HEAD.size : _HEAD.size + length]
        if zlib.crc32(content) == checksum:
            break
    else:
        return None
    try:
        return _decoder.decode(content)
    # Too deep a structure is a RecursionError, even in a field that nobody knows.
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return None


def _shortened(problems: dict[str, str]) -> dict[str, str]:
    return {name: problem[:_LONGEST] for name, problem in problems.items()}
