"""Brings a checkpoint's folder to S3, from where workers read it. Without torch.

A push writes first what it is about (a draft of the manifest) into a prefix that is empty, then the
files, and last the manifest, without which no worker sees a checkpoint. So whatever lies there
under an equal draft came from a push of the same files, and one that was killed goes on: with the
next file, or the next part of a large one. Nothing that is there is ever written over.
"""

import hashlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from safetensors import SafetensorError, safe_open

from blipq.s3.refusals import Refusal, code_of, refusal_of, s3_errors, status_of
from blipq.s3.storage import Storage
from blipq.submission import explain
from blipq_worker.catalog.models import QFORMER_TOKENIZER, ModelError
from blipq_worker.catalog.s3.keys import model_storage
from blipq_worker.catalog.s3.manifest import DRAFT, MANIFEST, Manifest, StoredFile, stored_file
from blipq_worker.catalog.s3.places import Place, place_of
from blipq_worker.catalog.weights import expanded, gigabytes, is_lfs_pointer, weight_files

#: Files of this size are sent in parts of it, of which S3 takes 10,000.
PART_BYTES = 32 * 2**20
_AT_ONCE = 4
#: What a checkpoint has beside its weights, by the ends of names.
_SMALL = (".json", ".txt", ".model")
_JSON = "application/json"

Report = Callable[[str], object]


def push(folder: Path, target: str, report: Report = lambda line: None) -> str:
    """Pushes a checkpoint's folder to ``s3://bucket/prefix``; the name to serve it by, pinned.

    report: gets a line for each step. Raises ModelError, and as ``Storage``.
    """
    place = place_of(target)
    if place.revision:
        raise ModelError(f"{target}: the revision is that of the files; push to {place.uri()}")
    paths = files_of(folder)
    size = gigabytes(sum(path.stat().st_size for path in paths.values()))
    report(f"{len(paths)} files, {size}: computing digests")
    manifest = _manifest(paths)
    push = _Push(place, manifest, report)
    push.begin()
    for name, path in paths.items():
        push.send(name, path)
    push.end()
    return f"{place.uri()}@{manifest.revision}"


def files_of(folder: Path) -> dict[str, Path]:
    """What of a folder is pushed, by name. Raises ModelError for what is no checkpoint."""
    folder = expanded(str(folder))
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} is no checkpoint's folder: it has no config.json")
    try:
        weights = list(weight_files(folder))
    except ModelError as error:
        raise ModelError(f"{folder}: {error}") from error
    for file in weights:
        _require_whole(file)
    small = _small_files(folder)
    if (folder / QFORMER_TOKENIZER).is_dir():
        small += _small_files(folder / QFORMER_TOKENIZER)
    return {each.relative_to(folder).as_posix(): each for each in (*small, *weights)}


def _small_files(folder: Path) -> list[Path]:
    return sorted(
        each
        for each in folder.iterdir()
        if each.is_file() and each.name.endswith(_SMALL) and each.name not in (MANIFEST, DRAFT)
    )


def _require_whole(file: Path) -> None:
    """Reads the header, which holds the length of a file."""
    if is_lfs_pointer(file):
        raise ModelError(f"{file} is in Git LFS and not here: run `git lfs pull`")
    try:
        with safe_open(file, framework="numpy"):
            pass
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{file} is no whole file of safetensors: {error}") from error


def _manifest(paths: dict[str, Path]) -> Manifest:
    try:
        return Manifest(files={name: stored_file(path) for name, path in paths.items()})
    except OSError as error:
        raise ModelError(f"cannot read a file: {error}") from error
    except ValidationError as error:
        raise ModelError(f"this folder cannot be pushed: {explain(error)}") from None


@dataclass(frozen=True, slots=True)
class _Part:
    """A part of a file, counted from 1."""

    number: int
    start: int
    size: int


class _Push:
    """One push to a place."""

    def __init__(self, place: Place, manifest: Manifest, report: Report) -> None:
        self._place, self._manifest, self._report = place, manifest, report
        self._storage: Storage = model_storage(connections=_AT_ONCE + 1, attempts=5)

    @property
    def _client(self) -> Any:
        return self._storage.client

    def begin(self) -> None:
        """Refuses a place that holds anything else; else writes there what the push is about."""
        own = self._manifest.written()
        for name in (MANIFEST, DRAFT):
            found = self._read(name)
            if found is not None and found != own:
                begun = "a push of other files has begun" if name == DRAFT else "there are others"
                raise self._taken(f"{begun} ({self._place.uri(name)})")
            if found is not None:
                return
        if (other := self._any_object()) is not None:
            raise self._taken(f"there is s3://{self._place.bucket}/{other}")
        if not self._put(DRAFT, own, _JSON):
            raise self._taken("another push begins at this moment")

    def send(self, name: str, path: Path) -> None:
        """Sends a file, unless it is there."""
        file = self._manifest.files[name]
        if self._is_there(name, file):
            self._report(f"{name}: is there")
            return
        self._report(f"{name}: {gigabytes(file.bytes)}")
        if file.bytes <= PART_BYTES:
            self._put(name, path.read_bytes(), _JSON if name.endswith(".json") else None)
        else:
            self._send_parts(name, path)
        if not self._is_there(name, file):
            raise ModelError(f"{self._place.uri(name)} was sent and is not there: push again")

    def end(self) -> None:
        """Makes it a checkpoint."""
        self._put(MANIFEST, self._manifest.written(), _JSON)
        self._storage.delete(self._place.uri(DRAFT))

    # -- objects --

    def _taken(self, why: str) -> ModelError:
        return ModelError(
            f"{self._place.uri()} is taken: {why}; push to another prefix, or empty this one"
        )

    def _read(self, name: str) -> bytes | None:
        if self._storage.head(self._place.bucket, self._place.key(name)) is None:
            return None
        return self._storage.read(self._place.uri(name))

    def _any_object(self) -> str | None:
        prefix = self._place.key("")
        with s3_errors(self._place.uri()):
            found = self._client.list_objects_v2(
                Bucket=self._place.bucket, Prefix=prefix, MaxKeys=1
            )
        return next((each["Key"] for each in found.get("Contents", ())), None)

    def _is_there(self, name: str, file: StoredFile) -> bool:
        found = self._storage.head(self._place.bucket, self._place.key(name))
        if found is not None and found["ContentLength"] != file.bytes:
            raise self._taken(f"{self._place.uri(name)} is of another size")
        return found is not None

    def _put(self, name: str, data: bytes, content_type: str | None) -> bool:
        """Writes an object where none is; whether it did."""
        content_type = content_type or "application/octet-stream"
        return self._storage.put_over(self._place.uri(name), data, "", content_type=content_type)

    # -- large files --

    def _send_parts(self, name: str, path: Path) -> None:
        where = {"Bucket": self._place.bucket, "Key": self._place.key(name)}
        uri = self._place.uri(name)
        with s3_errors(uri), _ended_elsewhere(), ThreadPoolExecutor(_AT_ONCE) as pool:
            where["UploadId"] = (
                self._begun(where)
                or self._client.create_multipart_upload(
                    **where, ContentType="application/octet-stream"
                )["UploadId"]
            )
            sent = self._sent(where)
            parts = list(_parts(self._manifest.files[name].bytes))
            tags = pool.map(lambda part: self._send_part(where, path, part, sent), parts)
            done = [
                {"PartNumber": part.number, "ETag": tag}
                for part, tag in zip(parts, tags, strict=True)
            ]
            self._complete(where, done)

    def _begun(self, where: dict[str, str]) -> str | None:
        """The upload of this file that a killed push has left, if there is one."""
        found = self._client.list_multipart_uploads(Bucket=where["Bucket"], Prefix=where["Key"])
        uploads = [each for each in found.get("Uploads", ()) if each["Key"] == where["Key"]]
        return str(uploads[-1]["UploadId"]) if uploads else None

    def _sent(self, where: dict[str, str]) -> dict[int, str]:
        """ETags of the parts that are there, by number."""
        pages = self._client.get_paginator("list_parts").paginate(**where)
        return {
            each["PartNumber"]: each["ETag"] for page in pages for each in page.get("Parts", ())
        }

    def _send_part(self, where: Any, path: Path, part: _Part, sent: dict[int, str]) -> str:
        """Sends a part, unless its bytes are there: its ETag is their MD5, as a rule."""
        with path.open("rb") as file:
            file.seek(part.start)
            data = file.read(part.size)
        digest = hashlib.md5(data, usedforsecurity=False).hexdigest()
        if (tag := sent.get(part.number)) is not None and tag.strip('"') == digest:
            return tag
        answer = self._client.upload_part(**where, PartNumber=part.number, Body=data)
        return str(answer["ETag"])

    def _complete(self, where: Any, parts: list[dict[str, Any]]) -> None:
        """Makes the parts an object, unless another push of the same files has done so."""
        from botocore.exceptions import ClientError

        what = {**where, "MultipartUpload": {"Parts": parts}}
        try:
            self._client.complete_multipart_upload(**what, IfNoneMatch="*")
        except ClientError as error:
            if status_of(error) == 501:  # a store that does not know conditions
                self._client.complete_multipart_upload(**what)
            elif refusal_of(error) is Refusal.CHANGED:
                self._client.abort_multipart_upload(**where)  # its parts would be kept, and paid
            else:
                raise


@contextmanager
def _ended_elsewhere() -> Iterator[None]:
    """Passes over an upload that is gone: another push of the same files has completed it, as a
    rule. Whether the object is there must be seen.
    """
    from botocore.exceptions import ClientError

    try:
        yield
    except ClientError as error:
        if code_of(error) != "NoSuchUpload":
            raise


def _parts(size: int) -> Iterator[_Part]:
    for number, start in enumerate(range(0, size, PART_BYTES), 1):
        yield _Part(number, start, min(PART_BYTES, size - start))
