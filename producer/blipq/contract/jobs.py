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
    """How long the work took, and what did it. Times in milliseconds.

    ``vision_ms`` is part of the passes beside it: of ``generate_ms`` and the like. It is 0, and
    ``cache_hit`` true, where the image's features were cached; then ``decode_ms`` is missing.
    ``decode_wait_ms`` is the wait until other images were decoded: where it is long and ``wait_ms``
    short, the host lacks cores, not the model time.
    ``gpu_ms`` is the job's share of the passes that it ran in, with other jobs beside it.
    ``first_token_ms`` is from the job's submission to the first token of its first text.
    ``shared``: the request was coalesced with an equal one that ran at the same time, so this job
    has no passes of its own. ``note`` is a remark on the answer for people.
    """

    queue_ms: float | None = None
    fetch_ms: float | None = None
    decode_wait_ms: float | None = None
    decode_ms: float | None = None
    wait_ms: float | None = None
    vision_ms: float | None = None
    generate_ms: float | None = None
    match_ms: float | None = None
    embed_ms: float | None = None
    index_ms: float | None = None
    rerank_ms: float | None = None
    gpu_ms: float | None = None
    first_token_ms: float | None = None
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

    ``image`` is where its image is, without the query of a URL, which may hold a signature.
    While the job is open, ``live_workers`` is the number of live workers of its model, ``note``
    what keeps it from being run, if that is known, and ``last_error`` why it is run again.
    ``eta`` is when it should end, predicted from jobs like it and from what is ahead of it; missing
    where no such job has ended yet, and while no worker lives that serves its model.
    ``queue_position`` is how many waiting jobs of its model are taken before it; missing while it
    runs, and while it waits for the time of a retry.
    ``tenant`` is whose job it is, if it is a tenant's.
    ``result_uri``: the s3:// object that holds the result, where that is not in the ledger.
    """

    id: str
    kind: Kind
    model: str
    status: Status
    created_at: datetime
    started_at: datetime | None = None
    completed_at: datetime | None = None
    expires_at: datetime
    eta: datetime | None = None
    queue_position: int | None = None
    attempts: int = 0
    image: str | None = None
    result: Result | None = None
    result_uri: str | None = None
    error: JobError | None = None
    receipt: Receipt | None = None
    metadata: dict[str, str] = Field(default_factory=dict)
    tenant: str | None = None
    live_workers: int | None = None
    note: str | None = None
    last_error: JobError | None = None

    @property
    def ended(self) -> bool:
        """Whether the status is terminal: it will never change again."""
        return self.status in TERMINAL_STATUSES
