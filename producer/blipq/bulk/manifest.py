"""Requests to come, one after the other: lines of a file or an object, or the keys of a prefix."""

import codecs
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from pydantic import ValidationError

from blipq.bulk.sniffing import check_manifest
from blipq.contract import Options, Request, no_s3_uri, request_adapter, split_s3_uri
from blipq.contract.base import HALF_A_PAIR
from blipq.errors import InvalidRequest
from blipq.s3.refusals import s3_errors
from blipq.s3.storage import Storage
from blipq.submission import checked, explain
from blipq.watch.objects import Objects, Upload
from blipq.watch.rules import templated

BLOCK_BYTES = 2**20
LONGEST_LINE = 2**20
LONGEST_ID = 512


@dataclass(frozen=True, slots=True)
class Entry:
    """A line. ``work`` is its request, as JSON that ``submission`` reads, or None with ``error``.

    ``position`` is where the next one begins.
    """

    number: int
    position: str
    custom_id: str | None
    work: str | None
    error: str | None = None


class Manifest(Protocol):
    """A source of entries."""

    @property
    def name(self) -> str: ...

    @property
    def version(self) -> str:
        """Changes with the content."""

    @property
    def size(self) -> int | None:
        """Bytes; None if unknown."""

    def entries(self, number: int, position: str) -> Iterator[Entry]:
        """The entries behind number ``number``, which ended at ``position``."""


def read_work(work: str) -> tuple[Request, Options]:
    """The request and the options of an entry's ``work``."""
    fields = json.loads(work)
    return request_adapter.validate_python(fields["request"]), Options(**fields["options"])


def _work(fields: Mapping[str, Any], options: Mapping[str, Any]) -> str:
    """Checks a request and its options, and makes them one text. Raises InvalidRequest."""
    if "idempotency_key" in options:
        raise InvalidRequest("options.idempotency_key: the custom_id is it")
    try:
        request = request_adapter.validate_python(fields)
    except ValidationError as error:
        raise InvalidRequest(explain(error, Request)) from None
    chosen = checked(Options, **options)
    return json.dumps(
        {
            "request": request.model_dump(mode="json", exclude_defaults=True)
            | {"kind": request.kind},
            "options": chosen.model_dump(mode="json", exclude_defaults=True),
        }
    )


# --- lines ----------------------------------------------------------------------------------------


class LocalFile:
    """A local file. Raises InvalidRequest if it cannot be read."""

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        self._path = path
        try:
            with path.open("rb") as file:
                self.version = hashlib.file_digest(file, "sha256").hexdigest()[:32]
                self.size = file.tell()
        except OSError as error:
            raise InvalidRequest(f"cannot read {path}: {error.strerror}") from None

    def read(self, offset: int) -> bytes:
        with self._path.open("rb") as file:
            file.seek(offset)
            return file.read(BLOCK_BYTES)


class S3Object:
    """An object's bytes, a block per request: no connection waits while jobs run."""

    def __init__(self, uri: str, storage: Storage) -> None:
        self.name = uri
        self._client = storage.client
        try:
            self._bucket, self._key = split_s3_uri(uri)
        except ValueError as error:
            raise InvalidRequest(str(error)) from None
        found = storage.head(self._bucket, self._key)
        if found is None:
            raise InvalidRequest(f"S3 refuses: there is no {uri}")
        self.size = found["ContentLength"]
        self.version = found["ETag"]

    def read(self, offset: int) -> bytes:
        """The next block. Raises InvalidRequest if the object has changed."""
        if offset >= self.size:
            return b""
        with s3_errors(self.name):
            answer = self._client.get_object(
                Bucket=self._bucket,
                Key=self._key,
                Range=f"bytes={offset}-{offset + BLOCK_BYTES - 1}",
                IfMatch=self.version,
            )
            return answer["Body"].read()


class JsonLines:
    """A manifest with a request per line, beside its ``custom_id`` and ``options``.

    Raises InvalidRequest for a file of another kind.
    """

    def __init__(self, blocks: LocalFile | S3Object, defaults: Mapping[str, Any]) -> None:
        self.name, self.version, self.size = blocks.name, blocks.version, blocks.size
        self._blocks = blocks
        self._defaults = defaults
        check_manifest(self.name, blocks.read(0))

    def entries(self, number: int, position: str) -> Iterator[Entry]:
        """The entries behind number ``number``, which ended at the offset ``position``."""
        for end, text in self._lines(int(position or 0)):
            number += 1
            # Editors and exports set a mark at the start; `cat` puts it between lines.
            line = text and text.removeprefix(codecs.BOM_UTF8)
            if line is None:
                error = f"longer than {LONGEST_LINE:,} bytes"
                yield Entry(number, str(end), None, None, error)
            elif line.strip():
                yield self._entry(number, str(end), line)

    def _lines(self, start: int) -> Iterator[tuple[int, bytes | None]]:
        """Where each line ends, and its text, or None if it is too long to be kept."""
        offset, kept, dropped = start, b"", 0
        while block := self._blocks.read(offset):
            offset += len(block)
            *whole, kept = (kept + block).split(b"\n")
            for line in whole:
                start += dropped + len(line) + 1
                yield start, None if dropped else line
                dropped = 0
            if dropped or len(kept) > LONGEST_LINE:
                dropped, kept = dropped + len(kept), b""
        if dropped or kept:
            yield start + dropped + len(kept), None if dropped else kept

    def _entry(self, number: int, position: str, line: bytes) -> Entry:
        custom_id = None
        try:
            fields = _read(line)
            if not isinstance(fields, dict):
                raise InvalidRequest("a line is an object with custom_id and a request")
            custom_id = _custom_id(fields.pop("custom_id", None))
            options = fields.pop("options", None) or {}
            if not isinstance(options, dict):
                raise InvalidRequest("options: an object is expected")
            work = _work(fields, {**self._defaults, **options})
        except (ValueError, RecursionError) as error:
            return Entry(number, position, custom_id, None, str(error))
        return Entry(number, position, custom_id, work)


def _read(line: bytes) -> Any:
    """A line's JSON. Raises InvalidRequest for what no journal and no S3 key could hold."""
    try:
        fields = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise InvalidRequest(
            f"not UTF-8: byte {error.start + 1} is {line[error.start]:#x}"
        ) from None
    except json.JSONDecodeError as error:
        raise InvalidRequest(f"not one JSON object: {_why(line.strip(), error)}") from None
    try:
        json.dumps(fields, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise InvalidRequest(HALF_A_PAIR) from None
    return fields


def _why(line: bytes, error: json.JSONDecodeError) -> str:
    """What is wrong, by what people write into manifests, and else by the parser."""
    if line.startswith((b"#", b"//")):
        return "a comment, which JSON does not have: leave it out"
    if error.msg == "Extra data" and line.endswith(b","):
        return "a comma behind it: leave it out"
    return f"{error.msg} at character {error.pos + 1}"


def _custom_id(value: Any) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= LONGEST_ID:
        raise InvalidRequest(f"custom_id: a text of 1 to {LONGEST_ID} characters is expected")
    return value


# --- keys -----------------------------------------------------------------------------------------


class Prefix:
    """A request per object under a prefix, made of a template; its key is the ``custom_id``."""

    size = None

    def __init__(
        self, uri: str, template: Mapping[str, Any], defaults: Mapping[str, Any], storage: Storage
    ) -> None:
        self._bucket, _, self._prefix = uri.removeprefix("s3://").partition("/")
        if not uri.startswith("s3://") or not self._bucket:
            raise InvalidRequest(no_s3_uri(uri, "s3://bucket/prefix"))
        self._objects = Objects(storage)
        self._fields = dict(template)
        self._options = {**defaults, **(self._fields.pop("options", None) or {})}
        self.name = uri
        text = json.dumps(template, sort_keys=True)
        self.version = hashlib.sha256(text.encode()).hexdigest()[:32]
        self._work_of(Upload(self._bucket, "sample", "etag", 1, datetime.now(UTC)))

    def entries(self, number: int, position: str) -> Iterator[Entry]:
        """The entries behind the key ``position``."""
        for page in self._objects.pages(self._bucket, self._prefix, position):
            for upload in page.uploads:
                if not upload.key.endswith("/"):
                    number += 1
                    yield self._entry(number, upload)

    def _entry(self, number: int, upload: Upload) -> Entry:
        try:
            return Entry(number, upload.key, upload.key, self._work_of(upload))
        except InvalidRequest as error:
            return Entry(number, upload.key, upload.key, None, str(error))

    def _work_of(self, upload: Upload) -> str:
        image = upload.reference.model_dump(exclude_none=True)
        return _work({**self._fields, "image": image}, templated(self._options, upload))
