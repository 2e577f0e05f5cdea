"""Jobs on their way into the ledger and out of it: what scripts are told and what they answer.

Pure, so that the synchronous and the asynchronous ledger share it.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from blipq.contract import CONTRACT, JobInfo, Kind, Options, Request
from blipq.errors import (
    BlipqError,
    IdempotencyConflict,
    InvalidRequest,
    QueueFull,
    UnknownModel,
)
from blipq.ledger.keys import ended_channel, model_of, queue_name
from blipq.settings import Settings
from blipq.ssrf.policy import Forbidden
from blipq.submission import Submission


def ms(seconds: float) -> int:
    """Seconds as the whole milliseconds that the scripts count in."""
    return max(1, round(seconds * 1000))


@dataclass(frozen=True, slots=True)
class Message:
    """What must be published so that a worker looks at a job."""

    kind: Kind
    id: str
    queue: str
    #: Whether a live worker served the job's model when it was recorded.
    served: bool = field(default=True, compare=False)

    @property
    def model(self) -> str:
        """The model that the queue is of."""
        return model_of(self.queue)


#: A job was recorded, and its message is to be published; or it was known, under this id.
Recorded = Message | str


@dataclass(frozen=True, slots=True)
class Prepared:
    """A submission and what the submit script is told of it."""

    submission: Submission
    arguments: tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class Looked:
    """What a look at jobs found; those that are merely open are in none of the fields.

    ``elsewhere`` holds jobs whose end is told on another client's channel, with that channel.
    ``left`` is how many seconds the open ones have until the last of their deadlines.
    """

    ended: dict[str, JobInfo]
    unknown: set[str]
    elsewhere: dict[str, str]
    left: float = 0.0

    def about(self, ids: Iterable[str]) -> "Looked":
        """The part that is about these jobs."""
        ids = list(ids)
        return Looked(
            {id: self.ended[id] for id in ids if id in self.ended},
            self.unknown.intersection(ids),
            {id: self.elsewhere[id] for id in ids if id in self.elsewhere},
            self.left,
        )


def digest(request: str, options: Options) -> str:
    """What makes two submits the same: the request and every option but the key itself."""
    given = options.model_dump(mode="json", exclude_defaults=True, exclude={"idempotency_key"})
    rest = json.dumps(given, sort_keys=True)  # metadata in another order is the same
    return hashlib.sha256(f"{request}\n{rest}".encode()).hexdigest()[:32]


def prepare(submission: Submission, settings: Settings, *, notify: str) -> Prepared:
    """Makes a job ready to be recorded. Raises InvalidRequest for a forbidden URL."""
    options = submission.options
    _check_urls(submission.request, options, settings)
    text = _request_text(submission.request)
    fields: dict[str, str | int] = {  # the script knows the place of the model
        "contract": CONTRACT,
        "kind": submission.request.kind,
        "model": options.model,
        "queue": queue_name(options.model, options.priority),
        "request": text,
        "notify": ended_channel(notify),
        "result_ttl": ms(settings.result_ttl),
        "failed_ttl": ms(settings.failed_ttl),
        **_optional_fields(options),
    }
    pairs = flat(fields)
    expires_in = ms(options.expires_in or settings.default_expires_in)
    key = options.idempotency_key or ""
    arguments = [submission.id, digest(text, options), key, expires_in, len(pairs), *pairs]
    return Prepared(submission, tuple(arguments))


def submit_arguments(jobs: Iterable[Prepared], settings: Settings) -> Iterator[str | int]:
    """What the submit script is told."""
    yield ms(max(settings.result_ttl, settings.failed_ttl))
    yield settings.max_open_jobs
    yield declared_models(settings)
    for job in jobs:
        yield from job.arguments


def declared_models(settings: Settings) -> str:
    """Models that jobs may name before a worker has served them, as scripts take them."""
    return f" {' '.join(settings.known_models)} "


def submitted(jobs: Sequence[Prepared], answer: Sequence[str]) -> list[Recorded | BlipqError]:
    """What the submit script's answer means."""
    answers = zip(jobs, answer[::2], answer[1::2], strict=False)  # a refusal ends it early
    return [_submitted(job.submission, outcome, id) for job, outcome, id in answers]


def _submitted(submission: Submission, outcome: str, id: str) -> Recorded | BlipqError:
    if outcome == "conflict":
        return IdempotencyConflict(f"job {id} was submitted with another request or options")
    if outcome == "full":
        return QueueFull("too many jobs are open (BLIPQ_MAX_OPEN_JOBS)")
    if outcome == "unknown":
        return unknown_model(submission.options.model, id)
    if outcome == "exists":
        return id
    return replace(message_of(submission), served=outcome == "created")


def unknown_model(model: str, served: str) -> UnknownModel:
    """Why a job for this model is refused. ``served``: 'name=live workers', with spaces between."""
    named = [pair.rpartition("=") for pair in served.split()]
    known = [f"{name!r} ({_workers(int(live))})" for name, _, live in named]
    told = f"served: {', '.join(known)}" if known else "none is served yet"
    return UnknownModel(
        f"model: no worker has served {model!r} in the last 40 days; {told}. "
        "BLIPQ_KNOWN_MODELS names others that jobs may wait for",
        model,
    )


def _workers(live: int) -> str:
    return f"{live} live worker{'s' if live > 1 else ''}" if live else "no live worker now"


def message_of(submission: Submission) -> Message:
    """The message of a submitted job."""
    options = submission.options
    queue = queue_name(options.model, options.priority)
    return Message(Kind(submission.request.kind), submission.id, queue)


def looked(answer: Sequence[Any]) -> Looked:
    """What the look script's answer means."""
    ended, unknown, elsewhere, left = answer
    infos = {id: job_info(id, paired(pairs)) for id, pairs in ended}
    return Looked(infos, set(unknown), dict(elsewhere), left / 1000)


def job_of(id: str, answer: Sequence[Any]) -> JobInfo | None:
    """What the read script's answer means: the job, or None for an unknown id."""
    if not answer:
        return None
    live, *pairs = answer
    return job_info(id, paired(pairs), live_workers=int(live))


def _request_text(request: Request) -> str:
    """The request as it is stored: what differs from the defaults, its kind first."""
    given = request.model_dump(mode="json", exclude_defaults=True)
    return json.dumps({"kind": request.kind, **given}, separators=(",", ":"))


def _optional_fields(options: Options) -> dict[str, str]:
    fields = {}
    if options.output:
        fields["output"] = options.output
    if options.metadata:
        fields["metadata"] = json.dumps(options.metadata)
    if options.webhook:
        fields["webhook_url"] = options.webhook.url
        fields["webhook_events"] = " ".join(options.webhook.events)
    return fields


def _check_urls(request: Request, options: Options, settings: Settings) -> None:
    """Says at once what the text of a URL says; its addresses are judged when it is met."""
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
    """Pairs one behind the other, as scripts take them."""
    return [part for pair in fields.items() for part in pair]


def paired(flat: Sequence[str]) -> dict[str, str]:
    """What stood one behind the other as pairs."""
    return dict(zip(flat[::2], flat[1::2], strict=True))


def job_info(id: str, job: Mapping[str, str], *, live_workers: int | None = None) -> JobInfo:
    """A record's fields as everyone sees the job."""

    def loaded(field: str) -> Any:
        return json.loads(job[field]) if field in job else None

    def at(field: str) -> float | None:
        return float(job[field]) / 1000 if field in job else None

    open_ = "completed_at" not in job
    unserved = open_ and live_workers == 0
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
            "attempts": int(job.get("attempts", 0)),
            "result": loaded("result"),
            "error": loaded("error"),
            "receipt": loaded("receipt"),
            "metadata": loaded("metadata") or {},
            "live_workers": live_workers if open_ else None,
            "last_error": loaded("last_error") if open_ else None,
            "note": f"no live worker serves the model {job['model']!r}" if unserved else None,
        }
    )
