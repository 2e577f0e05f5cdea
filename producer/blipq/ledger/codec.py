"""Arguments of the ledger's scripts, and what their replies mean.

Pure, so that the synchronous and the asynchronous clients share it.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

from blipq.contract import JobInfo, Kind, Options, Request, contract_of
from blipq.contract.base import NAME_PATTERN
from blipq.errors import (
    BlipqError,
    IdempotencyConflict,
    InvalidRequest,
    QueueFull,
    QueueUnavailable,
    TenantLimited,
    UnknownModel,
)
from blipq.ledger.keys import ended_channel, model_of, queue_name
from blipq.ledger.messages import listed
from blipq.ledger.work import eta_of, shape_of
from blipq.redis.cells import id_in
from blipq.settings import Settings
from blipq.ssrf.policy import Forbidden
from blipq.submission import Submission, new_id, shortened
from blipq.telemetry.trace import parsed

#: Characters of a message in a list, about.
_MESSAGE_SIZE = 600


def ms(seconds: float) -> int:
    """Seconds as the whole milliseconds that the scripts count in."""
    return max(1, round(seconds * 1000))


@dataclass(frozen=True, slots=True)
class Message:
    """What is published of a recorded job: a worker that takes it claims the job."""

    kind: Kind
    id: str
    queue: str
    #: Whether a live worker served the job's model when it was recorded.
    served: bool = field(default=True, compare=False)
    #: The cell that recorded it; None without cells, and where it is not known.
    cell: str | None = field(default=None, compare=False)
    #: Whether it was published as its job was recorded.
    published: bool = field(default=False, compare=False)

    @property
    def model(self) -> str:
        """The model that the queue is of."""
        return model_of(self.queue)


@dataclass(frozen=True, slots=True)
class Moved:
    """Where a job is to be recorded instead: a cell, at a place of the job's way."""

    place: int
    cell: str


#: Limits of this tenant are of all that have no limits of their own.
ALL_OTHERS = "*"
LEAST_RATE, MOST_RATE = 0.001, 1_000_000

#: A job was recorded, and its message is to be published; or it was known, under this id.
Recorded = Message | str

#: What became of a job in a cell.
Placed = Recorded | BlipqError | Moved

#: What became of a request to cancel a job. ``ended``: it had ended before.
Cancelled = Literal["cancelled", "ended", "unknown"]

#: What became of a submission. ``waits``: created, and no live worker serves its model.
Outcome = Literal[
    "created", "waits", "unpublished", "exists", "conflict", "full", "unknown", "limited"
]


@dataclass(frozen=True, slots=True)
class Prepared:
    """A submission, and what the ledger stores of it: ``fields`` become those of its hash.

    ``publishes``: with the record, in the list of its queue; else the client does.
    """

    submission: Submission
    digest: str
    expires_in_ms: int
    fields: Mapping[str, str | int]
    publishes: bool = False

    @property
    def size(self) -> int:
        """About how many characters the fields and the message take."""
        fields = sum(len(name) + len(str(value)) for name, value in self.fields.items())
        return fields + (_MESSAGE_SIZE if self.publishes else 0)


@dataclass(frozen=True, slots=True)
class Polled:
    """What a poll found. Jobs that are open, and notify this client, are in none of the fields.

    ``elsewhere`` holds jobs that notify on another client's channel, with that channel.
    ``left`` is how many seconds the open ones have until the last of their deadlines. Those in
    ``later`` have ended, too, and did not fit into the reply. Those in ``away`` are in cells that
    do not answer, for the reason named there.
    """

    ended: dict[str, JobInfo]
    unknown: set[str]
    elsewhere: dict[str, str]
    left: float = 0.0
    later: frozenset[str] = frozenset()
    away: Mapping[str, QueueUnavailable] = field(default_factory=dict)

    def about(self, ids: Iterable[str]) -> "Polled":
        """The part that is about these jobs."""
        ids = list(ids)
        return Polled(
            {id: self.ended[id] for id in ids if id in self.ended},
            self.unknown.intersection(ids),
            {id: self.elsewhere[id] for id in ids if id in self.elsewhere},
            self.left,
            self.later.intersection(ids),
            {id: self.away[id] for id in ids if id in self.away},
        )


def digest(request: str, options: Options, tenant: str | None = None) -> str:
    """What makes two submits the same: the request, every option but the key itself, the tenant."""
    given = options.model_dump(mode="json", exclude_defaults=True, exclude={"idempotency_key"})
    rest = json.dumps(given, sort_keys=True)  # metadata in another order is the same
    of = f"\n{tenant}" if tenant is not None else ""
    return hashlib.sha256(f"{request}\n{rest}{of}".encode()).hexdigest()[:32]


def prepare(submission: Submission, settings: Settings, *, notify: str) -> Prepared:
    """Makes a job ready to be recorded. Raises InvalidRequest for a forbidden URL, or a tenant."""
    options = submission.options
    check_tenant(submission.tenant)
    check_urls(submission.request, options, settings)
    text = _request_text(submission.request)
    fields: dict[str, str | int] = {  # the submit script reads some by their places
        "contract": contract_of(submission.request, options),
        "kind": submission.request.kind,
        "model": options.model,
        "queue": queue_name(options.model, options.priority),
        "work": shape_of(submission.request),
        "request": text,
        "notify": ended_channel(notify),
        "result_ttl": ms(_kept_for(settings.result_ttl, options)),
        "failed_ttl": ms(_kept_for(settings.failed_ttl, options)),
        **_optional_fields(options, settings),
        **({} if submission.rights is None else {"rights": submission.rights}),
        **({} if submission.tenant is None else {"tenant": submission.tenant}),
        **({"traceparent": trace} if (trace := parsed(submission.traceparent)) else {}),
    }
    expires_in_ms = ms(options.expires_in or settings.default_expires_in)
    if key := scoped_key(submission):
        fields["idempotency_key"] = key
    same = digest(text, options, submission.tenant)
    return Prepared(submission, same, expires_in_ms, fields)


def check_tenant(name: str | None) -> None:
    """Raises InvalidRequest for what is no tenant's name: it is part of names of keys."""
    if name is not None and not (isinstance(name, str) and re.fullmatch(NAME_PATTERN, name)):
        shown = shortened(str(name))
        raise InvalidRequest(f"tenant: {shown!r} is no name (letters, digits, dots, dashes, _)")


def limit_arguments(tenant: str, open_jobs: int | None, rate: float | None) -> tuple[str, ...]:
    """The limit script's arguments. Raises InvalidRequest."""
    if tenant != ALL_OTHERS:
        check_tenant(tenant)
    if open_jobs is not None and open_jobs < 0:
        raise InvalidRequest("open_jobs: 0 or more are expected")
    if rate is not None and not LEAST_RATE <= rate <= MOST_RATE:
        raise InvalidRequest(f"rate: {LEAST_RATE} to {MOST_RATE:,} jobs a second are expected")
    return tenant, *("-" if each is None else str(each) for each in (open_jobs, rate))


def limits_text(tenant: str, open_jobs: int | None, rate: float | None) -> str:
    """A tenant's limits for people, and for the log of actions: both, as both are set at once."""
    if open_jobs is None and rate is None:
        return f"{tenant}: no limits of its own"
    open_ = "any number of" if open_jobs is None else f"{open_jobs:,}"
    a_second = "any number of" if rate is None else f"{rate:,.10g}"
    return f"{tenant}: {open_} open jobs, {a_second} jobs a second"


def only(ids: Iterable[str]) -> str | None:
    """The id that an error of a call is about, if the call is about one job."""
    all_ids = list(ids)
    return all_ids[0] if len(all_ids) == 1 else None


def retention_ms(settings: Settings) -> int:
    """How long a record is kept after its job's deadline, at the least."""
    return ms(max(settings.result_ttl, settings.failed_ttl))


def submit_arguments(
    jobs: Iterable[Prepared], settings: Settings, place: int | None = None, onward: str = ""
) -> Iterator[str | int]:
    """The submit script's arguments.

    place: of the cell on the jobs' way through several. onward: place and name of the next one, to
    which those go on that are unknown here.
    """
    yield retention_ms(settings)
    yield settings.max_open_jobs
    yield declared_models(settings)
    yield "" if place is None else place
    yield onward
    yield ms(max(settings.result_ttl, settings.failed_ttl, settings.dead_letter_ttl))
    for job in jobs:
        pairs = flat(job.fields)
        key = scoped_key(job.submission) or ""
        yield from (job.submission.id, job.digest, key, job.expires_in_ms)
        yield from (_message(job), len(pairs), *pairs)


def _message(job: Prepared) -> str:
    """What a job is published by as it is recorded; "" where the client does that."""
    if not job.publishes:
        return ""
    made = message_of(job.submission)
    return listed(made.kind, made.id, made.queue)


def scoped_key(submission: Submission) -> str | None:
    """The idempotency key as it is kept: tenants share none. A tenant's name has no colon."""
    key, tenant = submission.options.idempotency_key, submission.tenant
    return key if key is None or tenant is None else f"{tenant}:{key}"


def declared_models(settings: Settings) -> str:
    """Models that jobs may name before a worker has served them, as scripts take them."""
    return f" {' '.join(settings.known_models)} "


def submitted(
    jobs: Sequence[Prepared], answer: Sequence[str], cell: str | None = None
) -> list[Recorded | BlipqError]:
    """The submit script's reply, job by job. ``cell``: whose reply it is, where there are some."""
    return cast("list[Recorded | BlipqError]", placed(jobs, answer, cell))


def placed(jobs: Sequence[Prepared], answer: Sequence[str], cell: str | None) -> list[Placed]:
    """The same where the script was given a place."""
    outcomes = zip(jobs, answer[::2], answer[1::2], strict=False)  # a refusal ends it early
    return [
        moved(id) if each == "moved" else recorded(job, cast(Outcome, each), id, cell)
        for job, each, id in outcomes
    ]


def moved(text: str) -> Moved:
    """The reply of ``moved_to`` in the scripts."""
    place, _, cell = text.partition(" ")
    return Moved(int(place), cell)


def recorded(
    job: Prepared, outcome: Outcome, id: str, cell: str | None = None
) -> Recorded | BlipqError:
    """What became of one submission, in a cell where there are some.

    ``id``: of the job; for ``unknown`` the served models, for ``limited`` the limit that was met.
    """
    submission = job.submission
    if outcome == "conflict":
        return IdempotencyConflict(
            f"job {id} was submitted with another request or options: give another key or id"
        )
    if outcome == "full":
        return QueueFull("too many jobs are open (BLIPQ_MAX_OPEN_JOBS)")
    if outcome == "unknown":
        return unknown_model(submission.options.model, id)
    if outcome == "limited":
        limit, most, wait_ms = id.split()
        wait_s = int(wait_ms) / 1000
        return TenantLimited(submission.tenant or "", limit, json.loads(most), wait_s)
    if outcome == "exists":
        return id
    published = job.publishes and outcome != "unpublished"
    return message_of(submission, outcome != "waits", cell, published)


def check_arguments(models: Iterable[str], settings: Settings) -> Iterator[str]:
    """The unknown_models script's arguments."""
    yield declared_models(settings)
    yield from sorted(set(models))


def check(answer: Sequence[str]) -> None:
    """Raises UnknownModel if the unknown_models script named one."""
    served, *unknown = answer
    if unknown:
        raise unknown_model(unknown[0], served)


def unknown_model(model: str, served: str) -> UnknownModel:
    """Why a job for this model is refused. ``served``: 'name=live workers', with spaces between."""
    named = [pair.rpartition("=") for pair in served.split()]
    known = [f"{name!r} ({_workers(int(live))})" for name, _, live in named]
    listed = f"served: {', '.join(known)}" if known else "none is served yet"
    return UnknownModel(
        f"model: no worker has served {model!r} in the last 40 days; {listed}. "
        "BLIPQ_KNOWN_MODELS names others that jobs may wait for",
        model,
    )


def _workers(live: int) -> str:
    return f"{live} live worker{'s' if live > 1 else ''}" if live else "no live worker now"


def made_id(settings: Settings) -> str:
    """An id for a new job, which ends with the cell where the settings are of one."""
    return new_id() if settings.cell is None else id_in(new_id(), settings.cell)


def message_of(
    submission: Submission, served: bool = True, cell: str | None = None, published: bool = False
) -> Message:
    """The message of a submitted job."""
    options = submission.options
    queue = queue_name(options.model, options.priority)
    kind = Kind(submission.request.kind)
    return Message(kind, submission.id, queue, served, cell, published)


def poll_arguments(ids: Iterable[str], notify: str) -> Iterator[str]:
    """The poll script's arguments."""
    yield ended_channel(notify)
    yield from ids


def polled(answer: Sequence[Any]) -> Polled:
    """The poll script's reply."""
    ended, unknown, elsewhere, left, later = answer
    infos = {id: job_info(id, paired(pairs)) for id, pairs in ended}
    return Polled(infos, set(unknown), dict(elsewhere), left / 1000, frozenset(later))


def job_of(id: str, answer: Sequence[Any]) -> JobInfo | None:
    """The read script's reply: the job, or None for an unknown id."""
    if not answer:
        return None
    live, paused, outlook, *pairs = answer
    job = paired(pairs)
    eta = None if paused == 1 else eta_of(job, int(live), outlook)
    position = int(outlook[1]) if outlook and job["status"] == "queued" else -1
    return job_info(
        id,
        job,
        live_workers=int(live),
        paused=paused == 1,
        eta=eta,
        queue_position=None if position < 0 else position,
    )


def _request_text(request: Request) -> str:
    """The request as it is stored: what differs from the defaults, its kind first."""
    given = request.model_dump(mode="json", exclude_defaults=True)
    return json.dumps({"kind": request.kind, **given}, separators=(",", ":"))


def _kept_for(ttl: float, options: Options) -> float:
    """How long a job is kept: a job may shorten the time to live, and not stretch it."""
    return ttl if options.keep is None else min(options.keep, ttl)


def _optional_fields(options: Options, settings: Settings) -> dict[str, str]:
    fields = {}
    if options.output:
        fields["output"] = options.output
    if options.metadata:
        fields["metadata"] = json.dumps(options.metadata)
    if options.webhook:
        fields["webhook_url"] = options.webhook.url
        fields["webhook_events"] = " ".join(options.webhook.events)
    if (options.output or options.webhook) and not settings.keep_delivered:
        fields["drop"] = "1"
    return fields


def check_urls(request: Request, options: Options, settings: Settings) -> None:
    """Raises InvalidRequest for what the text of a URL shows.

    Its addresses are checked when it is used.
    """
    field = "webhook.url"
    try:
        if options.webhook:
            settings.webhook_policy.check(options.webhook.url)
        field = "image.uri"
        if request.image is not None and not request.image.in_s3:
            settings.image_policy.check(request.image.uri)
    except Forbidden as error:
        raise InvalidRequest(f"{field}: {error}") from None


def flat(fields: Mapping[str, Any]) -> list[Any]:
    """Names and values in turn, as scripts take them."""
    return [part for pair in fields.items() for part in pair]


def paired(flat: Sequence[str]) -> dict[str, str]:
    """A dictionary of names and values in turn."""
    return dict(zip(flat[::2], flat[1::2], strict=True))


def _image_of(request: Any) -> str | None:
    """Where a request's image is, without what follows ``?`` in a URL."""
    image = request.get("image") if isinstance(request, dict) else None
    uri = image.get("uri") if isinstance(image, dict) else image
    if not isinstance(uri, str):
        return None
    return uri if uri.startswith("s3://") else uri.partition("?")[0]


def messages(found: Sequence[str]) -> list[Message]:
    """Messages from kind, id and queue in turn, as scripts return them."""
    triples = zip(found[::3], found[1::3], found[2::3], strict=True)
    return [Message(Kind(kind), id, queue) for kind, id, queue in triples]


def job_info(
    id: str,
    job: Mapping[str, str],
    *,
    live_workers: int | None = None,
    paused: bool = False,
    eta: float | None = None,
    queue_position: int | None = None,
) -> JobInfo:
    """A record's fields as everyone sees the job. ``paused``: whether its queue is."""

    def loaded(field: str) -> Any:
        return json.loads(job[field]) if field in job else None

    def at(field: str) -> float | None:
        return float(job[field]) / 1000 if field in job else None

    open_ = "completed_at" not in job
    note = None
    if open_ and live_workers == 0:
        note = f"no live worker serves the model {job['model']!r}"
    elif "delivered" in job:
        note = "the result was delivered by webhook, and is kept no longer"
    elif job["status"] == "queued" and paused:
        note = f"the queue {job['queue']} is paused"
    return JobInfo.model_validate(
        {
            "id": id,
            "kind": job["kind"],
            "model": job["model"],
            "status": job["status"],
            "created_at": at("created_at"),
            "started_at": at("started_at"),
            "completed_at": at("completed_at"),
            "expires_at": at("deadline"),
            "eta": eta,
            "queue_position": queue_position,
            "attempts": int(job.get("attempts", 0)),
            "image": _image_of(loaded("request")),
            "result": loaded("result"),
            "result_uri": job.get("result_uri"),
            "error": loaded("error"),
            "receipt": loaded("receipt"),
            "metadata": loaded("metadata") or {},
            "tenant": job.get("tenant"),
            "live_workers": live_workers if open_ else None,
            "last_error": loaded("last_error") if open_ else None,
            "note": note,
        }
    )
