"""``s3://bucket/prefix`` as the name of a checkpoint, with ``@`` and a revision to pin it."""

import re
from dataclasses import dataclass

from blipq.contract import split_s3_uri
from blipq_worker.catalog.models import ModelError

_SCHEME = "s3://"
#: Of a revision, as many digits as are given must be the same.
_REVISION = re.compile(r"[0-9a-f]{8,64}")


@dataclass(frozen=True, slots=True)
class Place:
    """A checkpoint's folder in S3. revision: what its own must begin with."""

    bucket: str
    prefix: str
    revision: str = ""

    def key(self, name: str) -> str:
        """The key of a file in it."""
        return f"{self.prefix}/{name}"

    def uri(self, name: str = "") -> str:
        """The folder, or a file in it, as people write it."""
        return f"{_SCHEME}{self.bucket}/{self.prefix}" + (f"/{name}" if name else "")


def is_in_s3(checkpoint: str) -> bool:
    """Whether a checkpoint's name is a place in S3, and not a folder or a hub id."""
    return checkpoint.startswith(_SCHEME)


def place_of(checkpoint: str) -> Place:
    """The place that a name stands for. Raises ModelError for one that can be none."""
    uri, _, revision = checkpoint.partition("@")
    try:
        bucket, prefix = split_s3_uri(uri.rstrip("/"))
    except ValueError as error:
        raise ModelError(f"a checkpoint in S3 is s3://bucket/prefix: {error}") from None
    if any(part in ("", ".", "..") for part in prefix.split("/")):
        raise ModelError(f"{checkpoint!r} has a part that is empty, '.' or '..'")
    if "@" in checkpoint and _REVISION.fullmatch(revision) is None:
        raise ModelError(
            f"{checkpoint!r}: what follows @ is the revision that `blipq models push` printed, or "
            "its first 8 digits or more"
        )
    return Place(bucket, prefix, revision)
