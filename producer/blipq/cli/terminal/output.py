"""What every command prints, and how its errors become exit codes."""

import json
import logging
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich.console import Console, ConsoleOptions, RenderableType
from rich.markup import escape
from rich.segment import Segment
from rich.text import Text

from blipq.cli.terminal.maps import grids
from blipq.client.job import Job
from blipq.client.sync_client import Client
from blipq.contract import (
    CaptionResult,
    DescribeResult,
    EmbedResult,
    ErrorCode,
    Hit,
    JobInfo,
    MatchResult,
    Result,
    SearchResult,
    Status,
    VQAResult,
    Written,
)
from blipq.errors import (
    BlipqError,
    InvalidRequest,
    JobCancelled,
    JobExpired,
    JobFailed,
    JobNotFound,
    QueueFull,
    QueueUnavailable,
    ResultTimeout,
    TenantLimited,
)
from blipq.ledger.acting import acting, as_one, this_user
from blipq.ledger.changes import target_of
from blipq.printable import printable
from blipq.program import blipq
from blipq.settings import Settings
from blipq.submission import checked

EXIT_CODES: dict[type[BlipqError], int] = {
    InvalidRequest: 2,
    JobFailed: 3,
    JobNotFound: 4,
    ResultTimeout: 5,
    JobCancelled: 6,
    JobExpired: 6,
    QueueUnavailable: 7,
    QueueFull: 7,
}


class Terminal(Console):
    """A console that obeys its own controls alone, and none in a text that it shows."""

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """The segments of anything that is printed; those with ``control`` are the console's."""
        for segment in super().render(renderable, options):
            if segment.control:
                yield segment
            else:
                yield segment._replace(text=printable(segment.text))


errors = Terminal(stderr=True, highlight=False, soft_wrap=True)
out = Terminal(highlight=False, soft_wrap=True)

JsonOption = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]
LONGEST_ANSWER = 300
_DIGEST = re.compile(r"([0-9a-f]{8})[0-9a-f]{56}(\.\w+)?")
IdArgument = Annotated[str, typer.Argument(metavar="ID", help="The job's id.")]


@contextmanager
def connected(as_json: bool = False) -> Iterator[Client]:
    """A client; blipq's errors become one line and an exit code."""
    with reported(as_json):
        settings = checked(Settings)
        if as_json:
            logging.getLogger("blipq").addHandler(logging.NullHandler())  # stderr is silent
        else:
            errors.print(f"using {settings.endpoints}", style="dim", markup=False)
        user = acting(this_user(), "cli")
        with Client(settings) as client, user:
            yield client


@contextmanager
def reported(as_json: bool = False) -> Iterator[None]:
    """Turns an error into one line on stderr (or JSON) and a stable exit code."""
    try:
        with named_files():
            yield
    except BlipqError as error:
        if as_json:
            described = {"error": type(error).__name__, "message": str(error)}
            described |= {"code": error.code} if isinstance(error, JobFailed) else {}
            if (job_id := getattr(error, "job_id", None)) is not None:
                described["job_id"] = job_id
            print(json.dumps(described))
        else:
            # The message of an invalid request is clear without the code before it.
            message = str(error).removeprefix(f"{ErrorCode.INVALID_REQUEST}: ")
            errors.print(f"blipq: {message}", style="red", markup=False)
        raise typer.Exit(exit_code(error)) from None


@contextmanager
def named_files() -> Iterator[None]:
    """Turns the error of a file or folder that cannot be used into a BlipqError that names it."""
    try:
        yield
    except OSError as error:
        if error.filename is None:  # a pipe that nobody reads, say
            raise
        raise BlipqError(f"cannot use {error.filename}: {error.strerror}") from error


def act_on_each(ids: Sequence[str], act: Callable[[str], bool], unknown: str) -> None:
    """Acts on each id, as one line of the log of actions.

    Raises at the end: TenantLimited for jobs of a tenant at its limit, which hold up no others, or
    JobNotFound for all that ``act`` was False of, with ``unknown`` as the message for ``{}``.
    """
    missing: list[str] = []
    limited: dict[str, TenantLimited] = {}
    with as_one(target_of(ids)):
        for id in ids:
            try:
                if not act(id):
                    missing.append(id)
            except TenantLimited as error:
                limited[id] = error
    if limited:
        last = [*limited.values()][-1]
        done = f": not queued again are {', '.join(limited)}"
        raise TenantLimited(last.tenant, last.limit, last.most, done=done)
    if missing:
        raise JobNotFound(unknown.format(", ".join(missing)))


def exit_code(error: BlipqError) -> int:
    """The exit code that an error stands for."""
    if isinstance(error, JobFailed) and error.code == ErrorCode.INVALID_REQUEST:
        return EXIT_CODES[InvalidRequest]  # of which only the worker could know
    return next((code for kind, code in EXIT_CODES.items() if isinstance(error, kind)), 1)


def exit_code_of(info: JobInfo) -> int:
    """The exit code that a job's end stands for."""
    if info.status is Status.FAILED:
        wrong = info.error is not None and info.error.code == ErrorCode.INVALID_REQUEST
        return EXIT_CODES[InvalidRequest if wrong else JobFailed]
    ends = {Status.CANCELLED: JobCancelled, Status.EXPIRED: JobExpired}
    return EXIT_CODES[ends[info.status]] if info.status in ends else 0


def follow(job: Job[Any], wait: bool, timeout: float, as_json: bool) -> None:
    """Prints the job's result, or its id where nobody waits."""
    if not wait:
        print(json.dumps({"id": job.id}) if as_json else job.id)
        return
    try:
        info = _wait(job, timeout)
        found = job.result(timeout=0)
    except ResultTimeout:
        _go_on(job, as_json)
        raise
    except KeyboardInterrupt:  # the job goes on: whoever leaves must know its id
        _go_on(job, as_json)
        raise typer.Exit(130) from None
    if as_json:
        print_json(info.model_copy(update={"result": found}))
        return
    for line in lines_of(found):
        out.print(line, markup=False)
    if info.receipt is not None and info.receipt.note:
        errors.print(f"note: {info.receipt.note}", style="yellow", markup=False)


def _go_on(job: Job[Any], as_json: bool) -> None:
    if as_json:
        return
    errors.print(f"go on waiting with: {blipq(f'result {job.id}')}", style="dim", markup=False)
    errors.print(f"or end it with:     {blipq(f'cancel {job.id}')}", style="dim", markup=False)


def _wait(job: Job[Any], timeout: float) -> JobInfo:
    """Waits, and after a second prints on a terminal what for."""
    deadline = time.monotonic() + timeout
    try:
        return job.wait(min(1.0, timeout))
    except ResultTimeout:
        with errors.status(escape(spinner_line(job.info()))) as spinner:
            while True:
                left = deadline - time.monotonic()
                try:
                    return job.wait(max(0.0, min(1.0, left)))
                except ResultTimeout:
                    if left <= 0:
                        raise ResultTimeout(_waited(job, timeout), job.id) from None
                    spinner.update(escape(spinner_line(job.info())))


def _waited(job: Job[Any], timeout: float) -> str:
    return f"not ended after {timeout:g} s: {status_line(job.info())}"


def status_line(info: JobInfo) -> str:
    """A job on one line."""
    return f"{info.id}: {state_of(info)}"


def state_of(info: JobInfo) -> str:
    """Where a job is, and why it is there."""
    line: str = info.status
    if info.error is not None:
        line += f" ({info.error.code}: {info.error.message})"
    if info.note is not None:
        line += f", {info.note}"
    if info.queue_position:
        line += f", behind {info.queue_position:,}"
    if info.eta is not None:
        line += f", should end at {info.eta.astimezone():%H:%M:%S}"
    if info.attempts > 1:
        line += f", attempt {info.attempts}"
    if info.last_error is not None:
        line += f", after {info.last_error.code}: {info.last_error.message}"
    return line


def spinner_line(info: JobInfo) -> str:
    """A job on one line of a terminal, whose end may be cut off: the reason first, the id last."""
    return f"{info.note or state_of(info)} ({info.id})"


def lines_of(result: Result) -> Iterator[str]:
    """A result as lines for people."""
    match result:
        case CaptionResult():
            yield from _captions(result)
        case VQAResult():
            yield from _lines_of_answers(result)
        case MatchResult():
            for scored in result.scores:
                yield f"{scored.score:.3f}  {scored.text}"
                yield from grids(scored)
        case EmbedResult():
            yield from _features(result)
        case SearchResult():
            yield from _hits(result)
        case DescribeResult():
            for part in (result.caption, result.vqa, result.match, result.embed):
                yield from lines_of(part) if part is not None else ()


def _summary(result: Result) -> Iterator[str]:
    """The parts of a result on one line for people: of hits and scores the best first."""
    match result:
        case MatchResult():
            ranked = sorted(result.scores, key=lambda scored: -scored.score)
            yield from (f"{scored.score:.3f} {scored.text}" for scored in ranked)
        case SearchResult():
            yield from (_in_short(hit) for hit in result.hits)
            if not result.hits:
                yield "no hits"
            if result.skipped:
                yield f"{len(result.skipped)} skipped"
        case DescribeResult():
            for part in (result.caption, result.vqa, result.match, result.embed):
                yield from _summary(part) if part is not None else ()
        case _:
            yield from lines_of(result)


def _in_short(hit: Hit) -> str:
    score = f"itc {hit.itc:.3f}" if hit.itm is None else f"itm {hit.itm:.3f}"
    return f"{_picture(hit.id)} {score}"


def _captions(result: CaptionResult) -> Iterator[str]:
    for found in result.captions:
        line = found.text if found.score is None else f"{found.score:.3f}  {found.text}"
        yield f"{line}{_doubt(found)}"


def _doubt(text: Written) -> str:
    """What is added to a text that is less sure than its job wants it to be."""
    if not text.uncertain:
        return ""
    mean = text.mean_token_probability
    return "  (uncertain)" if mean is None else f"  (uncertain: {mean:.2f})"


def _lines_of_answers(result: VQAResult) -> Iterator[str]:
    for answer in result.answers:
        question = f"{answer.question}  " if len(result.answers) > 1 else ""
        if answer.choices is None:
            yield f"{question}{answer.text}{_doubt(answer)}"
        for place, choice in enumerate(answer.choices or ()):
            doubt = "  (uncertain)" if answer.uncertain and place == 0 else ""
            yield f"{question}{choice.probability:.3f}  {choice.text}{doubt}"


def _features(result: EmbedResult) -> Iterator[str]:
    if result.indexed is not None:
        yield f"indexed: {result.indexed}"
    for name, array in result.arrays.items():
        yield f"{name}  {array.dtype} {array.shape}"


def _hits(result: SearchResult) -> Iterator[str]:
    yield "  itm    itc  image" if result.hits else "no hits"
    for hit in result.hits:
        itm = "    -" if hit.itm is None else f"{hit.itm:.3f}"
        pairs = "".join(f"  {name}={value}" for name, value in hit.metadata.items())
        yield f"{itm} {hit.itc:6.3f}  {hit.id}{pairs}"
    for each in result.skipped:
        yield f"skipped: {each.id} ({each.code})"


def print_json(info: JobInfo) -> None:
    """The job as one line of JSON."""
    print(info.model_dump_json(exclude_none=True))


def print_jobs(infos: Iterable[JobInfo], as_json: bool, none: str = "no jobs") -> None:
    """Jobs as one object of JSON, or two lines each: what they are, and what came of them.

    none: what is said to people where there are none.
    """
    infos = list(infos)
    if as_json:
        jobs = [info.model_dump(mode="json", exclude_none=True) for info in infos]
        print(json.dumps({"jobs": jobs}, ensure_ascii=False))
        return
    if not infos:
        out.print(none)
    for info in infos:
        at = f"{info.created_at:%m-%d %H:%M:%S}"
        out.print(f"{at}  {info.kind:<8}  {info.status:<9}  {info.id}", markup=False)
        print_detail(answer_line(info))


def print_detail(text: str) -> None:
    """The second line of an entry of a list; a terminal shows what fits on it."""
    line = Text(f"                {text}", style="dim")
    if out.is_terminal:  # whole words, and the most important first
        line.truncate(out.width, overflow="ellipsis")
    out.print(line)


def _picture(uri: str) -> str:
    """The last part of an image's place; of an upload's digest its start."""
    name = uri.rpartition("/")[2] or uri
    return _DIGEST.sub(r"\1...\2", name)


def answer_line(info: JobInfo) -> str:
    """A job's picture, and its answer or where it is, on one line."""
    if info.result is not None:
        answer = "; ".join(" ".join(line.split()) for line in _summary(info.result))
    else:
        answer = state_of(info)
    parts = [_picture(info.image) if info.image else "", answer]
    return ": ".join(" ".join(part.split()) for part in parts if part)[:LONGEST_ANSWER]
