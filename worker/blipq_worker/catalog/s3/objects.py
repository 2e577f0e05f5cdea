"""The objects of a checkpoint in S3: read whole where they are small, and in checked blocks."""

import hashlib
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from pydantic import ValidationError

from blipq.backoff import Backoff
from blipq.submission import explain
from blipq_worker.catalog.s3.errors import Fault, S3ModelAway, S3ModelError, model_errors
from blipq_worker.catalog.s3.keys import model_storage
from blipq_worker.catalog.s3.manifest import DRAFT, MANIFEST, SMALL_BYTES, Manifest
from blipq_worker.catalog.s3.places import Place

T = TypeVar("T")

#: An object or a block is tried so often, each time for so long: a drip trips no read timeout.
TRIES, _TRY_S = 5, 60.0
_PAUSES = Backoff(0.25, 4.0, jitter=0.5)
_STEP_BYTES = 2**20


@dataclass(frozen=True, slots=True)
class Block:
    """A block of a file, counted from 0."""

    file: str
    number: int


class Objects:
    """Reads the objects at a place. Thread-safe. Raises S3ModelError, S3ModelAway.

    What S3 refuses for now, or a connection cuts off or garbles, is tried again.
    """

    def __init__(self, place: Place, *, connections: int = 4, tries: int = TRIES) -> None:
        self.place = place
        self._storage = model_storage(connections)
        self._tries = tries
        #: ETags of files of weights: all blocks are to be of one and the same object.
        self._etags: dict[str, str] = {}
        self._closed = threading.Event()

    def close(self) -> None:
        """Ends what is being read or tried again."""
        self._closed.set()

    def manifest(self) -> Manifest:
        """What a push has written last, of the revision that the place's name pins."""
        place = self.place
        try:
            manifest = Manifest.model_validate_json(self._pushed())
        except ValidationError as error:
            message = f"{place.uri(MANIFEST)} is no manifest: {explain(error)}"
            raise S3ModelError(Fault.DAMAGED, message) from None
        if not manifest.revision.startswith(place.revision):
            has = f"{place.uri()} has the revision {manifest.revision}"
            raise S3ModelError(Fault.CHANGED, f"{has}, and {place.revision} is wanted")
        return manifest

    def _pushed(self) -> bytes:
        try:
            return self._again(lambda: self._whole(MANIFEST))
        except S3ModelError as error:
            if error.code is not Fault.MISSING or self._head(DRAFT) is None:
                raise
            message = f"{self.place.uri()}: its push has not ended: run it again"
            raise S3ModelError(Fault.MISSING, message) from error

    def small(self, name: str, manifest: Manifest) -> bytes:
        """A small file's bytes, which are those that were pushed."""
        uri = self.place.uri(name)
        if name not in manifest.files:
            raise S3ModelError(Fault.MISSING, f"{uri} was not pushed")

        def checked() -> bytes:
            data = self._whole(name)
            if hashlib.sha256(data).hexdigest() != manifest.files[name].sha256:
                raise _Garbled(f"{uri} holds other bytes than were pushed")
            return data

        return self._again(checked)

    def check_weights(self, manifest: Manifest) -> None:
        """Raises where files of weights are missing, or of another size than was pushed."""
        for name, file in manifest.weights.items():
            uri = self.place.uri(name)
            found = self._again(partial(self._head, name))
            if found is None:
                raise S3ModelError(Fault.MISSING, f"{uri} is not there, and was pushed")
            if found["ContentLength"] != file.bytes:
                size = f"{found['ContentLength']:,} bytes, and {file.bytes:,} were pushed"
                raise S3ModelError(Fault.CHANGED, f"{uri} has {size}")
            self._etags[name] = found["ETag"]

    def block(self, block: Block, manifest: Manifest) -> bytearray:
        """A block's bytes, which are those that were pushed."""
        return self._again(lambda: self._checked_block(block, manifest))

    def _again(self, call: Callable[[], T]) -> T:
        for tries in range(self._tries - 1):
            try:
                return call()
            except (S3ModelAway, _Garbled):
                if self._closed.wait(_PAUSES.pause_s(tries)):
                    raise
        return call()

    def _checked_block(self, block: Block, manifest: Manifest) -> bytearray:
        file, uri = manifest.files[block.file], self.place.uri(block.file)
        start = block.number * manifest.block_bytes
        data = bytearray(min(manifest.block_bytes, file.bytes - start))
        self._read_into(block.file, start, memoryview(data))
        if hashlib.sha256(data).hexdigest() != file.blocks[block.number]:
            where = f"bytes {start:,} to {start + len(data) - 1:,}"
            raise _Garbled(f"{uri}: {where} are not those that were pushed")
        return data

    def _read_into(self, name: str, start: int, view: memoryview) -> None:
        """Fills the view with a file's bytes from ``start`` on."""
        at = 0
        conditions = {"Range": f"bytes={start}-{start + len(view) - 1}"}
        conditions |= {"IfMatch": self._etags[name]} if name in self._etags else {}
        for piece in self._pieces(name, **conditions):
            if at + len(piece) > len(view):
                raise S3ModelAway(f"{self.place.uri(name)}: more bytes came than were wanted")
            view[at : at + len(piece)] = piece
            at += len(piece)
        if at != len(view):
            cut = f"the connection was cut after {at:,} of {len(view):,} bytes"
            raise S3ModelAway(f"{self.place.uri(name)}: {cut}")

    def _whole(self, name: str) -> bytes:
        data = bytearray()
        for piece in self._pieces(name):
            data += piece
            if len(data) > SMALL_BYTES:
                message = f"{self.place.uri(name)} is larger than {SMALL_BYTES:,} bytes"
                raise S3ModelError(Fault.DAMAGED, message)
        return bytes(data)

    def _pieces(self, name: str, **conditions: Any) -> Iterator[bytes]:
        """An object's bytes as they come."""
        from urllib3.exceptions import HTTPError

        uri, deadline = self.place.uri(name), time.monotonic() + _TRY_S
        try:
            with model_errors(uri), closing(self._body(name, conditions)) as body:
                while piece := body._raw_stream.read1(_STEP_BYTES):
                    yield piece
                    if time.monotonic() > deadline or self._closed.is_set():
                        raise S3ModelAway(f"{uri}: not read within {_TRY_S:g} s")
        except (HTTPError, OSError) as error:
            raise S3ModelAway(f"{uri}: {error}") from error

    def _body(self, name: str, conditions: dict[str, Any]) -> Any:
        where = {"Bucket": self.place.bucket, "Key": self.place.key(name)}
        return self._storage.client.get_object(**where, **conditions)["Body"]  # type: ignore[arg-type]

    def _head(self, name: str) -> Any:
        with model_errors(self.place.uri(name)):
            return self._storage.head(self.place.bucket, self.place.key(name))


class _Garbled(S3ModelError):
    """Bytes are others than were pushed: on their way, or in S3, which another try shows."""

    def __init__(self, text: str) -> None:
        super().__init__(Fault.DAMAGED, text)
