"""WebDataset: a tar whose neighbouring members of one name, but for the ending, are a row."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from blipq.contract import ImageRef
from blipq.s3.storage import MAX_UPLOAD_BYTES
from blipq_datasets.fields import MOST_FIELDS, Fields
from blipq_datasets.sources.columns import Columns, key_of
from blipq_datasets.sources.members import Member, members, padded
from blipq_datasets.sources.places import Place, S3Place, opened, share_of
from blipq_datasets.sources.rows import END, Cursor, Damaged, Part, Row, parts_of

PICTURES = frozenset(["jpg", "jpeg", "png", "webp", "avif", "gif", "bmp", "tif", "tiff"])
SIDECARS = frozenset({"json", "txt", "cls"})
LONGEST_SIDECAR = 2**20


@dataclass(slots=True)
class _Sample:
    """The members of one row."""

    key: str
    picture: Member | None = None
    texts: dict[str, bytes] = field(default_factory=dict)
    error: str | None = None


class Tar:
    """A tar, or with ``packed`` a gzip of one.

    Rows of a tar in S3 name the part of the object that is their picture. Members that are neither
    pictures nor ``.json``, ``.txt`` or ``.cls`` are passed over.
    """

    def __init__(self, stem: str, place: Place, wanted: Columns, *, packed: bool) -> None:
        self.stem = stem
        self.version = place.version
        self._place = place
        self._key = wanted.key
        self._packed = packed

    def rows(self, start: Cursor) -> Iterator[tuple[Cursor, Row]]:
        index, at = start.rows, start.offset
        try:
            file = opened(self._place, packed=self._packed, at=at)
            for after, sample in self._samples(members(file, at, _is_wanted)):
                index, at = index + 1, after
                yield Cursor(after, index), self._row(sample)
        except Damaged as error:
            yield Cursor(END, index + 1), Row(None, error=f"{self._place.name}: {error}")

    @property
    def size(self) -> int:
        return self._place.size

    def share(self, cursor: Cursor) -> float:
        return share_of(self._place, cursor, packed=self._packed)

    def parts(self, fields: Fields, *, pictures: bool, lines: int) -> Iterator[Part]:
        return parts_of(self, fields, pictures=pictures)

    def _samples(self, found: Iterator[Member]) -> Iterator[tuple[int, _Sample]]:
        """Rows, each with where the next one begins."""
        sample: _Sample | None = None
        end, damage = 0, None
        try:
            for member in found:
                key, suffix = _split(member.name)
                end = member.offset + padded(member.size)
                if suffix not in PICTURES | SIDECARS:
                    continue
                if sample is not None and sample.key != key:
                    yield member.begin, sample
                    sample = None
                sample = sample or _Sample(key)
                _add(sample, member, suffix)
        except Damaged as error:  # what came before it is a row all the same
            damage = error
        if sample is not None:
            yield end, sample
        if damage is not None:
            raise damage

    def _row(self, sample: _Sample) -> Row:
        columns, error = _columns(sample)
        key = f"{self.stem}/{sample.key}"
        if self._key is not None:
            key = key_of(columns.get(self._key))
        picture = sample.picture
        if sample.error or error or picture is None:
            return Row(key, columns, error=sample.error or error or "the row has no picture")
        return Row(key, columns, self._reference(picture), picture.data, _suffix(picture))

    def _reference(self, picture: Member) -> ImageRef | None:
        if self._packed or not isinstance(self._place, S3Place):
            return None
        return ImageRef(
            uri=self._place.name,
            etag=self._place.version,
            offset=picture.offset,
            length=picture.size,
        )


def _split(name: str) -> tuple[str, str]:
    """A member's key and its ending in small letters: the last part is cut at its first dot."""
    folder, slash, last = name.rpartition("/")
    stem, _, suffix = last.partition(".")
    return folder + slash + stem, suffix.lower()


def _suffix(picture: Member) -> str:
    return f".{_split(picture.name)[1]}"


def _is_wanted(name: str, size: int) -> bool:
    suffix = _split(name)[1]
    if suffix in SIDECARS:
        return size <= LONGEST_SIDECAR
    return suffix in PICTURES and 0 < size <= MAX_UPLOAD_BYTES


def _add(sample: _Sample, member: Member, suffix: str) -> None:
    if member.data is None:
        most = LONGEST_SIDECAR if suffix in SIDECARS else MAX_UPLOAD_BYTES
        size = "is empty" if member.size == 0 else f"has more than {most:,} bytes"
        if suffix in PICTURES or member.size:
            sample.error = sample.error or f"{member.name} {size}"
    elif suffix in SIDECARS:
        sample.texts.setdefault(suffix, member.data)
    elif sample.picture is None:
        sample.picture = member


def _columns(sample: _Sample) -> tuple[dict[str, Any], str | None]:
    """The columns of a row, and what is wrong with them."""
    texts = {}
    for suffix, data in sample.texts.items():
        try:
            texts[suffix] = data.decode()
        except UnicodeDecodeError as error:
            return {}, f"its .{suffix} is not UTF-8: byte {error.start + 1}"
    try:
        found = json.loads(texts.pop("json", "{}"))
        json.dumps(found, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return {}, "its .json is not UTF-8"
    except (ValueError, RecursionError) as error:
        return texts, f"its .json is not JSON: {error}"
    if not isinstance(found, dict):
        found = {"json": found}
    if len(found) > MOST_FIELDS:
        return texts, f"its .json has more than {MOST_FIELDS} fields"
    found.pop("__key__", None)  # the tar's own counts
    return {"__key__": sample.key, **texts, **found}, None
