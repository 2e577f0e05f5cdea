"""Why jobs fail."""

from enum import StrEnum

from blipq.contract.base import Output


class ErrorCode(StrEnum):
    """Why a job failed. Stable: services switch on these."""

    INVALID_REQUEST = "invalid_request"
    IMAGE_NOT_FOUND = "image_not_found"
    IMAGE_FORBIDDEN = "image_forbidden"
    IMAGE_TOO_LARGE = "image_too_large"
    IMAGE_INVALID = "image_invalid"
    IMAGE_CHANGED = "image_changed"
    IMAGE_UNAVAILABLE = "image_unavailable"
    URL_FORBIDDEN = "url_forbidden"
    MODEL_UNAVAILABLE = "model_unavailable"
    OUT_OF_MEMORY = "out_of_memory"
    ATTEMPTS_EXHAUSTED = "attempts_exhausted"
    INTERNAL = "internal"


class JobError(Output):
    """Why a job failed; ``retryable`` is whether the same request may pass later."""

    code: ErrorCode
    message: str
    retryable: bool = False
