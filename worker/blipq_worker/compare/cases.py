"""What is replayed: jobs that the ledger keeps, or the lines of a manifest."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from pydantic import ValidationError

from blipq.bulk.manifest import JsonLines, LocalFile, read_work
from blipq.contract import (
    CaptionRequest,
    DescribeRequest,
    EmbedRequest,
    Generation,
    MatchRequest,
    Request,
    SearchRequest,
    Status,
    VQARequest,
    request_adapter,
)
from blipq.errors import InvalidRequest
from blipq.ledger.operator import OperatorLedger
from blipq.ledger.views.listing import Place, Wanted
from blipq.submission import explain

PAGE = 200
#: A text that is drawn at random is drawn with this seed, by both models.
SEED = 0


@dataclass(frozen=True, slots=True)
class Case:
    """A request by its job's id, or by its ``custom_id``."""

    name: str
    request: Request


@dataclass(frozen=True, slots=True)
class Skipped:
    """A case that is not compared, and why."""

    name: str
    why: str


def recent(
    ledger: OperatorLedger, model: str | None, most: int
) -> tuple[list[Case], list[Skipped]]:
    """At most so many jobs that succeeded, the newest first; those of one model, or of all.

    Raises QueueUnavailable.
    """
    cases: list[Case] = []
    skipped: list[Skipped] = []
    for id in islice(_ids(ledger, model), most):
        request = ledger.request(id)
        if request is None:
            skipped.append(Skipped(id, "its record is gone"))
            continue
        try:
            cases.append(Case(id, replayable(request_adapter.validate_python(request))))
        except ValidationError as error:  # of a version that knew other requests
            skipped.append(Skipped(id, explain(error, Request)))
    return cases, skipped


def _ids(ledger: OperatorLedger, model: str | None) -> Iterator[str]:
    wanted, after = Wanted(status=Status.SUCCEEDED, model=model), None
    while True:
        page = ledger.listing.page(wanted, limit=PAGE, after=after)
        yield from (info.id for info in page.jobs)
        following: Place | None = page.next
        if following is None:
            return
        after = following


def of_manifest(file: Path, most: int) -> list[Case]:
    """The first requests of a manifest as ``blipq bulk submit`` takes it. Raises InvalidRequest."""
    cases = []
    for entry in islice(JsonLines(LocalFile(file), {}).entries(0, ""), most):
        if entry.work is None:
            raise InvalidRequest(f"{file}: line {entry.number}: {entry.error}")
        request, _ = read_work(entry.work)
        cases.append(Case(entry.custom_id or f"line {entry.number}", replayable(request)))
    return cases


def replayable(request: Request) -> Request:
    """The request without what depends on more than the model: indexes, and chance.

    A search becomes the embedding of what it looks for.
    """
    match request:
        case SearchRequest(text=None):
            return EmbedRequest(image=request.image)
        case SearchRequest():
            return EmbedRequest(mode="text", text=request.text)
        case EmbedRequest():
            return request.model_copy(update={"index": None})
        case MatchRequest():  # maps are drawn of the scores, and are no answer of their own
            return request.model_copy(update={"explain": False})
        case CaptionRequest() | VQARequest() | DescribeRequest():
            return request.model_copy(update={"generation": _seeded(request.generation)})


def _seeded(generation: Generation | None) -> Generation | None:
    if generation is None or not generation.do_sample or generation.seed is not None:
        return generation
    return generation.model_copy(update={"seed": SEED})
