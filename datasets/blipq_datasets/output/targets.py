"""Where answered shards go: a folder or a prefix of S3. A file is there whole, or not at all."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from blipq.contract import split_s3_uri
from blipq.errors import InvalidRequest
from blipq.s3.refusals import s3_errors
from blipq.s3.storage import Storage


class LocalFolder:
    """A local folder, which is made. Raises InvalidRequest if it cannot be."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InvalidRequest(f"cannot write {folder}: {error.strerror}") from None
        if not os.access(folder, os.W_OK | os.X_OK):
            raise InvalidRequest(f"cannot write {folder}: Permission denied")

    def has(self, name: str) -> bool:
        """Whether a file is there."""
        return (self._folder / name).exists()

    @contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        """A path to write to; when the block ends, the file is there under its name."""
        path = self._folder / name
        scratch = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            yield scratch
            with scratch.open("rb") as file:
                os.fsync(file.fileno())
            scratch.replace(path)
        except OSError as error:
            raise InvalidRequest(f"cannot write {path}: {error.strerror}") from None
        finally:
            with suppress(OSError):
                scratch.unlink(missing_ok=True)


class S3Folder:
    """Objects below a prefix."""

    def __init__(self, prefix: str, storage: Storage) -> None:
        self._prefix = prefix.rstrip("/") + "/"
        self._storage = storage
        try:
            split_s3_uri(f"{self._prefix}name")
        except ValueError as error:
            raise InvalidRequest(str(error)) from None

    def has(self, name: str) -> bool:
        """Whether an object is there."""
        return self._storage.head(*split_s3_uri(self._prefix + name)) is not None

    @contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        """A path to write to; when the block ends, the object is there under its name."""
        uri = self._prefix + name
        with tempfile.TemporaryDirectory(prefix="blipq-") as folder:
            scratch = Path(folder, "shard")
            yield scratch
            with s3_errors(uri):
                self._storage.client.upload_file(str(scratch), *split_s3_uri(uri))


Target = LocalFolder | S3Folder


def target_of(place: str, storage: Storage) -> Target:
    """The folder or prefix of this name. Raises InvalidRequest."""
    return S3Folder(place, storage) if place.startswith("s3://") else LocalFolder(Path(place))
