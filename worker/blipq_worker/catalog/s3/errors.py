"""What keeps a checkpoint in S3 from being read: stable codes, and what to do."""

from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum

from blipq.s3.refusals import Refusal, S3Refused, S3Unavailable, s3_errors
from blipq_worker.catalog.models import ModelError, one_line


class Fault(StrEnum):
    """Why a checkpoint in S3 is not served. Stable; each message begins with one."""

    MISSING = "checkpoint_missing"
    CHANGED = "checkpoint_changed"
    DAMAGED = "checkpoint_damaged"
    FORBIDDEN = "checkpoint_forbidden"
    UNAVAILABLE = "checkpoint_unavailable"


class S3ModelError(ModelError):
    """A checkpoint in S3 cannot be served, and starting again would not help."""

    def __init__(self, code: Fault, text: str) -> None:
        super().__init__(f"{code}: {text}")
        self.code = code
        self.text = text


class S3ModelAway(S3Unavailable):
    """S3 does not give a checkpoint for now; starting again may help."""

    def __init__(self, text: str) -> None:
        super().__init__(one_line(f"{Fault.UNAVAILABLE}: {text}"))
        self.code = Fault.UNAVAILABLE


_CODES = {Refusal.MISSING: Fault.MISSING, Refusal.CHANGED: Fault.CHANGED}
_ADVICE = {
    Fault.MISSING: "`blipq models push FOLDER s3://...` brings a checkpoint there",
    Fault.CHANGED: "it was written again while it was read",
    Fault.FORBIDDEN: (
        "check BLIPQ_MODEL_S3_*; without the right to list the bucket, S3 answers the same for an "
        "object that is not there"
    ),
}


@contextmanager
def model_errors(uri: str) -> Iterator[None]:
    """S3's refusals of an object as S3ModelError, or as S3ModelAway where they may pass."""
    try:
        with s3_errors(uri):
            yield
    except S3Unavailable as error:
        raise S3ModelAway(str(error)) from error
    except S3Refused as error:
        code = _CODES.get(error.refusal, Fault.FORBIDDEN)
        raise S3ModelError(code, f"{error}; {_ADVICE[code]}") from error
