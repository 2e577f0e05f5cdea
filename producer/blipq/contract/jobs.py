"""A job as everyone sees it."""

from datetime import datetime
from enum import StrEnum

from pydantic import Field

from blipq.contract.base import Kind, Output
from blipq.contract.errors import JobError
from blipq.contract.results import Result


class Status(StrEnum):
    """Where a job is. An id that nobody submitted has no status: it is not found."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"


TERMINAL_STATUSES = frozenset(
    {Status.SUCCEEDED, Status.FAILED, Status.CANCELLED, Status.EXPIRED},
)


class Receipt(Output):
    """What the work took and who did it. Times in milliseconds.

    ``vision_ms`` is part of the passes that it is told beside: of ``generate_ms`` and the like. It
    is 0, and ``cache_hit`` true, where the model had seen the image before and need not look again;
    then ``decode_ms`` is missing. ``shared``: an equal job computed the answer at the same time, so
    this one's own passes are missing. ``note`` says what a person should know about the answer.
    """

    queue_ms: float | None = None
    fetch_ms: float | None = None
    decode_ms: float | None = None
    wait_ms: float | None = None
    vision_ms: float | None = None
    generate_ms: float | None = None
    match_ms: float | None = None
    embed_ms: float | None = None
    index_ms: float | None = None
    rerank_ms: float | None = None
    tokens: int | None = None
    batch_size: int | None = None
    cache_hit: bool | None = None
    shared: bool | None = None
    checkpoint: str | None = None
    revision: str | None = None
    dtype: str | None = None
    quantization: str | None = None
    worker: str | None = None
    note: str | None = None


class JobInfo(Output):
    """A job as the ledger has it. Times are UTC; ``attempts`` counts deliveries to a worker.

    While the job is open, ``live_workers`` says how many live workers serve its model, ``note``
    what keeps it from being run, if that is known, and ``last_error`` why it is run again.
    """

    id: str
    kind: Kind
    model: str
    status: Status
    created_at: datetime
    started_at: datetime | None = None
    completed_at: datetime | None = None
    expires_at: datetime
    attempts: int = 0
    result: Result | None = None
    error: JobError | None = None
    receipt: Receipt | None = None
    metadata: dict[str, str] = Field(default_factory=dict)
    live_workers: int | None = None
    note: str | None = None
    last_error: JobError | None = None

    @property
    def ended(self) -> bool:
        """Whether the status is terminal: it will never change again."""
        return self.status in TERMINAL_STATUSES
