"""Files that somebody else names."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


def is_same(path: Path, other: str | Path) -> bool:
    """Whether both are one file, however they are named."""
    try:
        return path.samefile(other)
    except (OSError, ValueError):  # ValueError: a NUL in a name
        return False


@contextmanager
def whole_file(path: Path, mode: int = 0o666) -> Iterator[BinaryIO]:
    """A file to write, which has its name when it is whole, or never.

    A pipe or a device is written as it is: another file in its place would take it from all others.
    ``mode``: of a new file. Raises OSError.
    """
    if path.exists() and not path.is_file():
        with path.open("wb") as file:
            yield file
        return
    target = path.resolve()  # behind a link: the link stays
    scratch = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        with open(os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode), "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(target)
    finally:
        scratch.unlink(missing_ok=True)
