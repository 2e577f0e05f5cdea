"""Files that a command writes."""

from pathlib import Path


def is_same(path: Path, other: str | Path) -> bool:
    """Whether both are one file, however they are named."""
    try:
        return path.samefile(other)
    except (OSError, ValueError):  # ValueError: a NUL in a name
        return False


def write_whole(path: Path, data: bytes) -> None:
    """Writes a file whole or not at all; a pipe or a device as it is. Raises OSError."""
    if path.exists() and not path.is_file():
        path.write_bytes(data)
        return
    target = path.resolve()
    scratch = target.with_name(f".{target.name}.new")
    try:
        scratch.write_bytes(data)
        scratch.replace(target)
    finally:
        scratch.unlink(missing_ok=True)
