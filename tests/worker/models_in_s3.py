"""Models in the stack's S3, for tests."""

import io
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from blipq import Settings
from blipq.local.stack import LocalStack
from blipq.s3.storage import Storage
from blipq_worker.catalog.s3.keys import environment_of

BUCKET = "blipq-models"


def reach(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Has this process reach models as the settings reach images."""
    for name, value in environment_of(settings).items():
        monkeypatch.setenv(name, value)


class Bucket:
    """The bucket of models, as somebody sees it who may do everything there."""

    def __init__(self, stack: LocalStack) -> None:
        self.settings = stack.settings()
        self.storage = Storage(self.settings)
        self.storage.create_bucket(BUCKET)

    def place(self) -> str:
        """A prefix that nothing is in."""
        return f"s3://{BUCKET}/{uuid4().hex}/v1"

    def keys(self, place: str) -> list[str]:
        """Names of the objects at a place."""
        prefix = place.removeprefix(f"s3://{BUCKET}/") + "/"
        found: Any = self.storage.client.list_objects_v2(Bucket=BUCKET, Prefix=prefix)
        return [each["Key"].removeprefix(prefix) for each in found.get("Contents", ())]

    def read(self, uri: str) -> bytes:
        return self.storage.read(uri)

    def write(self, uri: str, data: bytes) -> None:
        self.storage.put(uri, data, content_type="application/octet-stream")

    def damage(self, uri: str, at: int) -> None:
        """Writes the object again with one other byte."""
        data = io.BytesIO(self.read(uri))
        data.seek(at)
        byte = data.read(1)[0]
        data.seek(at)
        data.write(bytes([byte ^ 1]))
        self.write(uri, data.getvalue())

    def upload(self, folder: Path, place: str) -> None:
        """All files of a folder, without a manifest."""
        for file in folder.iterdir():
            self.write(f"{place}/{file.name}", file.read_bytes())
