"""The ``blipq`` command. Text for people on a terminal, ``--json`` for programs.

Exit codes: 0 success, 1 anything unexpected, 2 wrong usage or request, 3 the job failed, 4 no such
job, 5 not ended in time, 6 cancelled or expired, 7 Redis or S3 does not answer or is full,
130 interrupted.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from blipq import __version__
from blipq.client import Client
from blipq.contract import (
    CaptionResult,
    JobInfo,
    MatchResult,
    Priority,
    Result,
    Status,
    VQAResult,
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
)
from blipq.job import Job
from blipq.settings import Settings, read_stack_file

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

app = typer.Typer(
    help="Asynchronous BLIP-2 jobs: captions, answers and matches for images in S3.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
errors = Console(stderr=True, highlight=False, soft_wrap=True)
out = Console(highlight=False, soft_wrap=True)

ImageArgument = Annotated[str, typer.Argument(help="s3://bucket/key, or a local file to upload.")]
ModelOption = Annotated[str, typer.Option(help="Served model.")]
PriorityOption = Annotated[Priority, typer.Option(help="Served round robin.")]
ExpiresOption = Annotated[str | None, typer.Option(help="Deadline, such as 90s, 10m or 2d.")]
KeyOption = Annotated[str | None, typer.Option(help="The same key gives the same job.")]
OutputOption = Annotated[str | None, typer.Option(help="s3:// object to write the result to.")]
TimeoutOption = Annotated[float, typer.Option(help="Longest wait for the result, in seconds.")]
WaitOption = Annotated[bool, typer.Option("--wait/--no-wait", help="Print the id and leave.")]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]
GenerationOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="Generation parameter, e.g. num_beams=1."),
]
IdArgument = Annotated[str, typer.Argument(metavar="ID", help="The job's id.")]


# --- jobs -----------------------------------------------------------------------------------------


@app.command()
def caption(
    image: ImageArgument,
    prompt: Annotated[str | None, typer.Option(help="Text the caption goes on from.")] = None,
    best_of: Annotated[int | None, typer.Option(help="Rank this many captions.")] = None,
    generation: GenerationOption = None,
    model: ModelOption = "default",
    priority: PriorityOption = Priority.NORMAL,
    expires_in: ExpiresOption = None,
    idempotency_key: KeyOption = None,
    output: OutputOption = None,
    timeout: TimeoutOption = 60.0,
    wait: WaitOption = True,
    as_json: JsonOption = False,
) -> None:
    """Describe an image: blipq caption photo.jpg"""
    with connected(as_json) as client:
        job = client.caption(
            image,
            prompt,
            best_of=best_of,
            generation=_parameters(generation),
            model=model,
            priority=priority,
            expires_in=expires_in,
            idempotency_key=idempotency_key,
            output=output,
        )
        follow(job, wait, timeout, as_json)


@app.command()
def vqa(
    image: ImageArgument,
    questions: Annotated[list[str], typer.Argument(help="One or more questions.")],
    generation: GenerationOption = None,
    model: ModelOption = "default",
    priority: PriorityOption = Priority.NORMAL,
    expires_in: ExpiresOption = None,
    idempotency_key: KeyOption = None,
    output: OutputOption = None,
    timeout: TimeoutOption = 60.0,
    wait: WaitOption = True,
    as_json: JsonOption = False,
) -> None:
    """Ask about an image: blipq vqa photo.jpg "how many dogs are there?"."""
    with connected(as_json) as client:
        job = client.vqa(
            image,
            questions,
            generation=_parameters(generation),
            model=model,
            priority=priority,
            expires_in=expires_in,
            idempotency_key=idempotency_key,
            output=output,
        )
        follow(job, wait, timeout, as_json)


@app.command()
def match(
    image: ImageArgument,
    texts: Annotated[list[str], typer.Argument(help="One or more texts.")],
    head: Annotated[str, typer.Option(help="itm: a probability; itc: a cosine.")] = "itm",
    model: ModelOption = "default",
    priority: PriorityOption = Priority.NORMAL,
    expires_in: ExpiresOption = None,
    idempotency_key: KeyOption = None,
    output: OutputOption = None,
    timeout: TimeoutOption = 60.0,
    wait: WaitOption = True,
    as_json: JsonOption = False,
) -> None:
    """Score texts against an image: blipq match photo.jpg "a cat" "a dog"."""
    with connected(as_json) as client:
        job = client.match(
            image,
            texts,
            head=head,  # type: ignore[arg-type]  # pydantic checks it and names the choices
            model=model,
            priority=priority,
            expires_in=expires_in,
            idempotency_key=idempotency_key,
            output=output,
        )
        follow(job, wait, timeout, as_json)


@app.command()
def status(id: IdArgument, as_json: JsonOption = False) -> None:
    """Show where a job is, and when no live worker serves its model."""
    with connected(as_json) as client:
        info = client.job(id).info()
        if as_json:
            print_json(info)
        else:
            out.print(_status_line(info))


@app.command()
def result(id: IdArgument, timeout: TimeoutOption = 60.0, as_json: JsonOption = False) -> None:
    """Wait for a job and print its result."""
    with connected(as_json) as client:
        follow(client.job(id), True, timeout, as_json)


@app.command()
def cancel(id: IdArgument, as_json: JsonOption = False) -> None:
    """Cancel a job, wherever it is."""
    with connected(as_json) as client:
        job = client.job(id)
        cancelled = job.cancel()
        if as_json:
            print(json.dumps({"id": id, "cancelled": cancelled, "status": job.status}))
        else:
            out.print("cancelled" if cancelled else f"it had ended: {job.status}")


# --- services -------------------------------------------------------------------------------------


@app.command()
def up(
    redis_port: Annotated[int | None, typer.Option(help="Redis port.")] = None,
    s3_port: Annotated[int | None, typer.Option(help="S3 port.")] = None,
    folder: Annotated[Path | None, typer.Option(help="Where data and logs are kept.")] = None,
    worker: Annotated[bool, typer.Option(help="Also start a worker.")] = True,
) -> None:
    """Start a local stack: Redis, S3 and a worker. Ctrl-C stops it all."""
    from blipq import up as stack

    with reported():
        raise typer.Exit(stack.run(redis_port, s3_port, folder, with_worker=worker))


@app.command()
def down() -> None:
    """Stop the local stack that `blipq up` started."""
    stack = read_stack_file()
    if stack is None:
        errors.print("no local stack is running")
        return
    pid = int(stack["pid"])
    os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + 90
    while read_stack_file() is not None and time.monotonic() < deadline:
        time.sleep(0.1)
    if read_stack_file() is not None:
        errors.print(f"the local stack (pid {pid}) is still draining")
        raise typer.Exit(1)
    errors.print("stopped")


@app.command()
def worker() -> None:
    """Run one worker process for the services that the settings name."""
    import importlib.util

    if importlib.util.find_spec("torch") is None:
        errors.print("no worker here: pip install 'blipq[worker]'")
        raise typer.Exit(1)
    os.execv(sys.executable, [sys.executable, "-m", "blipq_worker"])


# --- output ---------------------------------------------------------------------------------------


@contextmanager
def connected(as_json: bool = False) -> Iterator[Client]:
    """A client; blipq's errors become one line and an exit code."""
    with reported(as_json):
        settings = Settings()
        if not as_json:
            errors.print(f"using {settings.endpoints}", style="dim")
        with Client(settings) as client:
            yield client


@contextmanager
def reported(as_json: bool = False) -> Iterator[None]:
    """Turns an error into one line on stderr (or JSON) and a stable exit code."""
    try:
        yield
    except BlipqError as error:
        if as_json:
            described = {"error": type(error).__name__, "message": str(error)}
            described |= {"code": error.code} if isinstance(error, JobFailed) else {}
            print(json.dumps(described))
        else:
            errors.print(f"blipq: {error}", style="red", markup=False)
        raise typer.Exit(_exit_code(error)) from None


def _exit_code(error: BlipqError) -> int:
    return next((code for kind, code in EXIT_CODES.items() if isinstance(error, kind)), 1)


def follow(job: Job[Any], wait: bool, timeout: float, as_json: bool) -> None:
    """Prints the job's result, or its id where nobody waits."""
    if not wait:
        print(json.dumps({"id": job.id}) if as_json else job.id)
        return
    try:
        info = _wait(job, timeout)
        found = job.result(timeout=0)
    except ResultTimeout:
        if not as_json:
            errors.print(f"go on waiting with: blipq result {job.id}", style="dim")
        raise
    if as_json:
        print_json(info)
        return
    for line in lines_of(found):
        out.print(line, markup=False)
    if info.receipt is not None and info.receipt.note:
        errors.print(f"note: {info.receipt.note}", style="yellow")


def _wait(job: Job[Any], timeout: float) -> JobInfo:
    """Waits, and after a second says on a terminal what for."""
    deadline = time.monotonic() + timeout
    try:
        return job.wait(min(1.0, timeout))
    except ResultTimeout:
        with errors.status(f"{job.id}: {job.status}") as spinner:
            while True:
                left = deadline - time.monotonic()
                try:
                    return job.wait(max(0.0, min(1.0, left)))
                except ResultTimeout:
                    if left <= 0:
                        raise ResultTimeout(_waited(job, timeout)) from None
                    spinner.update(_status_line(job.info()))


def _waited(job: Job[Any], timeout: float) -> str:
    return f"not ended after {timeout:g} s: {_status_line(job.info())}"


def _status_line(info: JobInfo) -> str:
    line = f"{info.id}: {info.status}"
    if info.error is not None:
        line += f" ({info.error.code}: {info.error.message})"
    if info.live_workers == 0:
        line += f", no live worker serves the model {info.model!r}"
    if info.attempts > 1:
        line += f", attempt {info.attempts}"
    return line


def lines_of(result: Result) -> Iterator[str]:
    """A result as lines for people."""
    match result:
        case CaptionResult():
            for found in result.captions:
                yield found.text if found.score is None else f"{found.score:.3f}  {found.text}"
        case VQAResult(answers=(answer,)):
            yield answer.text
        case VQAResult():
            for answer in result.answers:
                yield f"{answer.question}  {answer.text}"
        case MatchResult():
            for scored in result.scores:
                yield f"{scored.score:.3f}  {scored.text}"
        case _:
            yield result.model_dump_json(exclude_none=True)


def print_json(info: JobInfo) -> None:
    """The job as one line of JSON."""
    print(info.model_dump_json(exclude_none=True))
    if info.status is Status.FAILED:
        raise typer.Exit(EXIT_CODES[JobFailed])


def _parameters(pairs: list[str] | None) -> dict[str, Any] | None:
    if not pairs:
        return None
    split = [pair.partition("=") for pair in pairs]
    return {name.strip(): value.strip() for name, _, value in split}


def _version(shown: bool) -> None:
    if shown:
        print(f"blipq {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Asynchronous BLIP-2 jobs: captions, answers and matches for images in S3."""


def main() -> None:
    """The entry point."""
    app()
