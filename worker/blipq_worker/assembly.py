"""Builds the parts of a process that takes jobs from its settings; knows no model."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from blipq.images.decoding import ImageLimits
from blipq.index.store import Indexes
from blipq.ledger.worker import GRACE_S, WorkerLedger
from blipq.s3.storage import Storage
from blipq.settings import Settings
from blipq.ssrf.http import GuardedHttp
from blipq.transport.broker import Broker
from blipq_worker.claims import Held
from blipq_worker.images.fetch import Fetcher
from blipq_worker.images.forgetting import Forgetting
from blipq_worker.images.https import HttpsFetcher
from blipq_worker.images.loader import Pictures
from blipq_worker.images.memory_budget import Budget
from blipq_worker.images.s3_access import S3Access
from blipq_worker.index.writer import IndexWriter
from blipq_worker.inference.interface import Inference
from blipq_worker.jobs.claiming import Claiming
from blipq_worker.jobs.execution import Execution
from blipq_worker.jobs.foreign import ForeignMessages
from blipq_worker.jobs.index_asker import IndexAccess
from blipq_worker.jobs.outcomes import Outcomes
from blipq_worker.jobs.outputs import Outputs, output_storage
from blipq_worker.jobs.quarantine import Gate
from blipq_worker.jobs.runner import Runner
from blipq_worker.process.heartbeat import Heartbeat
from blipq_worker.process.metrics import WorkerMetrics
from blipq_worker.process.reconciler import Reconciler
from blipq_worker.process.usage import Usage
from blipq_worker.settings import WorkerSettings

#: A picture is given up after so much CPU time, long before the watchdog ends the process.
DECODE_S = 20.0


@dataclass(frozen=True, slots=True)
class Base:
    """What the parts of a worker process share. models: those that it serves, by name."""

    name: str
    settings: Settings
    options: WorkerSettings
    models: Sequence[str]
    ledger: WorkerLedger
    broker: Broker
    held: Held = field(default_factory=Held)
    gate: Gate = field(default_factory=Gate)
    usage: Usage = field(default_factory=Usage)

    @property
    def grace_s(self) -> float:
        """How long after a lease's end its job is left to its worker."""
        return min(GRACE_S, self.options.lease_s)


@dataclass(frozen=True, slots=True)
class Jobs:
    """What runs jobs, and what else of it the process must reach."""

    runner: Runner
    foreign: ForeignMessages
    outcomes: Outcomes
    access: S3Access
    writer: IndexWriter
    forgetting: Forgetting


def decoding_budget(options: WorkerSettings) -> Budget:
    """Bounds the pictures that are decoded at once."""
    return Budget(
        options.decode_memory_bytes,
        most=options.decode_threads,
        use="to decode an image (BLIPQ_DECODE_MEMORY_BYTES, BLIPQ_DECODE_THREADS)",
    )


def jobs_of(base: Base, inference: Inference, decoding: Budget, metrics: WorkerMetrics) -> Jobs:
    """The parts that take a job from its message to its outcome."""
    options = base.options
    storage = _image_storage(base)
    access = S3Access(storage)
    indexes = Indexes(base.settings)
    writer = IndexWriter(indexes, max_waiting=2 * options.threads)
    foreign = ForeignMessages(base.ledger, metrics)
    outcomes = Outcomes(
        base.ledger,
        base.broker,
        base.held,
        metrics,
        access,
        usage=base.usage,
        retry_backoff_s=options.retry_backoff_s,
    )
    pictures = _pictures(base, storage, inference, decoding)
    execution = Execution(
        inference,
        pictures,
        Outputs(output_storage(base.settings, options), base.ledger, options),
        IndexAccess(indexes, writer),
        base.held,
        timeout_s=options.job_timeout_s,
    )
    runner = Runner(_claiming(base, foreign, outcomes), execution, outcomes, base.gate)
    forgetting = Forgetting(base.ledger, pictures, inference)
    return Jobs(runner, foreign, outcomes, access, writer, forgetting)


def heartbeat_of(
    base: Base,
    stalled_for: Callable[[], float],
    turning: Callable[[], bool],
    decode_bound: Callable[[], bool],
    decoding: Mapping[str, str],
) -> Heartbeat:
    """What keeps the process and its claims alive in the ledger.

    turning: whether the loop that takes messages is alive. The rest: see ``Heartbeat``.
    """
    options, gate = base.options, base.gate
    return Heartbeat(
        base.ledger,
        base.held,
        base.name,
        base.models,
        usage=base.usage,
        outputs=options.allowed_outputs,
        threads=options.threads,
        lease_s=options.lease_s,
        grace_s=base.grace_s,
        watchdog_s=options.watchdog_s,
        stalled_for=stalled_for,
        taking=lambda: gate.open and turning(),
        draining=lambda: gate.closed,
        decode_bound=decode_bound,
        decoding=decoding,
    )


def reconciler_of(base: Base) -> Reconciler:
    """What publishes again the jobs of workers that died."""
    return Reconciler(
        base.ledger,
        base.broker,
        base.name,
        lease_s=base.options.lease_s,
        grace_s=base.grace_s,
    )


def _claiming(base: Base, foreign: ForeignMessages, outcomes: Outcomes) -> Claiming:
    return Claiming(
        base.ledger,
        base.held,
        foreign,
        outcomes,
        worker=base.name,
        lease_s=base.options.lease_s,
        served=base.models,
        stopping=lambda: base.gate.closed,
    )


def _image_storage(base: Base) -> Storage:
    """One attempt within the job's deadline: the job itself is retried, with longer pauses."""
    return Storage(
        base.settings,
        max_connections=base.options.threads,
        read_timeout_s=min(10.0, base.options.fetch_timeout_s),
        attempts=1,
    )


def _pictures(base: Base, storage: Storage, inference: Inference, decoding: Budget) -> Pictures:
    options = base.options
    return Pictures(
        fetcher_of(base.settings, options, storage),
        inference,
        fetching=Budget(
            options.fetch_memory_bytes,
            most=options.threads,
            use="to fetch an image (BLIPQ_FETCH_MEMORY_BYTES)",
        ),
        decoding=decoding,
        limits=limits_of(options),
        timeout_s=options.job_timeout_s,
    )


def limits_of(options: WorkerSettings) -> ImageLimits:
    """Which images are decoded at all."""
    return ImageLimits(
        formats=options.image_formats,
        max_pixels=options.max_image_pixels,
        max_side=options.max_image_side,
        max_aspect=options.max_image_aspect,
        decode_s=min(DECODE_S, options.watchdog_s / 4),
    )


def fetcher_of(settings: Settings, options: WorkerSettings, storage: Storage) -> Fetcher:
    """What reads images, from where a worker with these options may."""
    return Fetcher(
        storage,
        max_bytes=options.max_image_bytes,
        timeout_s=options.fetch_timeout_s,
        allowed_buckets=options.allowed_buckets,
        https=_https_fetcher(settings, options) if options.https_images else None,
    )


def _https_fetcher(settings: Settings, options: WorkerSettings) -> HttpsFetcher:
    http = GuardedHttp(
        settings.image_policy, timeout_s=options.fetch_timeout_s, at_a_time=options.threads
    )
    return HttpsFetcher(http, max_bytes=options.max_image_bytes)
