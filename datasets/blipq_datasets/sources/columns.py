"""Which columns of a table are a row's picture, its key and its prompt."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from blipq.contract import ImageRef
from blipq.errors import InvalidRequest
from blipq.s3.storage import MAX_UPLOAD_BYTES
from blipq.submission import checked
from blipq_datasets.sources.rows import Row

#: Taken where none is named, the first that a table has.
IMAGES = ("image", "url", "image_url", "uri", "image_path", "path", "jpg", "png")
KEYS = ("custom_id", "key", "id")
LONGEST_KEY = 512


@dataclass(frozen=True, slots=True)
class Columns:
    """Names of columns; None is the first of the usual ones. Of a key, it may be none at all.

    folder: where paths of local pictures begin, which may lead nowhere else; None: no row may name
    a local file. needed: columns that a request names.
    """

    image: str | None = None
    key: str | None = None
    folder: Path | None = None
    needed: frozenset[str] = frozenset()

    @property
    def names(self) -> frozenset[str]:
        """All the columns that rows are made of, where those are known."""
        named = (self.image, self.key, ETAG)
        return self.needed.union(name for name in named if name is not None)

    def within(self, name: str, columns: Collection[str]) -> "Columns":
        """The same for a table with these columns. Raises InvalidRequest for what it lacks."""
        image = self.image or next((each for each in IMAGES if each in columns), None)
        if image is None:
            raise InvalidRequest(
                f"{name}: which column holds the pictures? Give --image-column: "
                f"{', '.join(columns)}"
            )
        named = {image, *self.needed, *([self.key] if self.key else ())}
        if missing := sorted(named.difference(columns)):
            raise InvalidRequest(
                f"{name} has no column {missing[0]!r}; its columns: {', '.join(columns)}"
            )
        return replace(self, image=image, key=self.key or _first(KEYS, columns))

    def row(self, columns: Mapping[str, Any], key: str) -> Row:
        """A row of a table; ``key`` is for one that has no column for it."""
        image = self.image or _first(IMAGES, columns)
        named = self.key or _first(KEYS, columns)
        key = key if named is None else key_of(columns.get(named))
        if not 0 < len(key) <= LONGEST_KEY:
            return Row(None, columns, error=f"{named}: 1 to {LONGEST_KEY} characters are expected")
        value = None if image is None else columns.get(image)
        try:
            return self._with_picture(Row(key, columns), value)
        except (InvalidRequest, ValidationError) as error:
            return Row(key, columns, error=f"{image}: {error}")

    def _with_picture(self, row: Row, value: Any) -> Row:
        if isinstance(value, Mapping):  # {"bytes": ..., "path": ...}
            value = value.get("bytes") or value.get("path")
        if isinstance(value, bytes | bytearray):
            return replace(row, data=_checked(bytes(value)))
        if not isinstance(value, str) or not value.strip():
            raise InvalidRequest("a URI, a path or the bytes of a picture are expected")
        if "://" in value:
            etag = row.columns.get(ETAG)
            return replace(row, image=checked(ImageRef, uri=value.strip(), etag=etag))
        path = self._local(value)
        return replace(row, data=_read(path), suffix=path.suffix.lower())

    def _local(self, name: str) -> Path:
        """A local picture's path: below the folder, whatever links and dots say."""
        if self.folder is None:
            raise InvalidRequest(f"{name[:200]!r} is no s3:// or https:// URI")
        try:
            path = (self.folder / name).resolve()
        except (OSError, ValueError, RuntimeError) as error:
            raise InvalidRequest(f"{name[:200]!r}: {error}") from None
        if not path.is_relative_to(self.folder.resolve()):
            raise InvalidRequest(f"{name[:200]!r} is outside {self.folder}")
        return path


#: A column of our own listings: the object's ETag in S3.
ETAG = "blipq_etag"


def _first(usual: tuple[str, ...], columns: Collection[str]) -> str | None:
    return next((each for each in usual if each in columns), None)


def key_of(value: Any) -> str:
    """A key as a text; what is neither a text nor a number is none."""
    return str(value) if isinstance(value, str | int) else ""


def _checked(data: bytes) -> bytes:
    if not data:
        raise InvalidRequest("the picture is empty")
    if len(data) > MAX_UPLOAD_BYTES:
        raise InvalidRequest(f"the picture has more than {MAX_UPLOAD_BYTES:,} bytes")
    return data


def _read(path: Path) -> bytes:
    try:
        if not path.is_file():
            raise InvalidRequest(f"there is no file {path}")
        with path.open("rb") as file:
            return _checked(file.read(MAX_UPLOAD_BYTES + 1))
    except OSError as error:
        raise InvalidRequest(f"cannot read {path}: {error.strerror}") from None
