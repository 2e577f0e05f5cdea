"""Outcomes as lines of JSON, in the order of the manifest, to a file or an object."""

import json
import tempfile
from pathlib import Path
from typing import BinaryIO

from blipq.bulk.journal import Journal
from blipq.contract import split_s3_uri
from blipq.errors import InvalidRequest
from blipq.files import whole_file
from blipq.s3.refusals import s3_errors
from blipq.s3.storage import Storage


def write(journal: Journal, target: str, storage: Storage) -> int:
    """Writes what has ended; how many lines. A reader of ``target`` never sees half of it."""
    if target.startswith("s3://"):
        return _to_s3(journal, target, storage)
    path = Path(target)
    try:
        with whole_file(path) as file:
            return _write(journal, file)
    except OSError as error:
        raise InvalidRequest(f"cannot write {path}: {error.strerror}") from None


def _to_s3(journal: Journal, uri: str, storage: Storage) -> int:
    try:
        bucket, key = split_s3_uri(uri)
    except ValueError as error:
        raise InvalidRequest(str(error)) from None
    with tempfile.TemporaryFile() as file:
        lines = _write(journal, file)
        file.seek(0)
        with s3_errors(uri):
            storage.client.upload_fileobj(
                file, bucket, key, ExtraArgs={"ContentType": "application/x-ndjson"}
            )
    return lines


def _write(journal: Journal, file: BinaryIO) -> int:
    lines = 0
    for outcome in journal.outcomes():
        file.write(json.dumps(outcome, ensure_ascii=False).encode() + b"\n")
        lines += 1
    file.flush()
    return lines
