"""Several images of one command: a bounded number of jobs at a time, answers in their order."""

import json
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import typer

from blipq.cli.terminal.output import errors, exit_code, lines_of, out
from blipq.client.job import Job
from blipq.errors import BlipqError, InvalidRequest, JobEnded

#: What is submitted ahead of the oldest answer that is still open.
MOST_OPEN = 64


@dataclass(frozen=True, slots=True)
class Several:
    """Images as they were given, and what submits the job of each."""

    images: Iterable[str]
    submit: Callable[[str], Job[Any]]


def named(images: Sequence[str]) -> Iterator[str]:
    """The images of the command line, of which ``-`` stands for the lines of stdin."""
    for image in images:
        if image == "-":
            yield from (line for each in sys.stdin if (line := each.strip()))
        else:
            yield image


def follow_all(several: Several, wait: bool, timeout: float, as_json: bool) -> None:
    """Prints what came of each image, a line or more; the first that failed gives the exit code.

    Raises what ends the whole, such as QueueUnavailable and ResultTimeout.
    """
    code, seen = 0, False
    jobs: deque[tuple[str, Job[Any]]] = deque()

    def take() -> int:
        image, job = jobs.popleft()
        return _ended(image, job, timeout, as_json)

    for image in several.images:
        seen = True
        try:
            job = several.submit(image)
        except InvalidRequest as error:
            code = _first(code, _refused(image, error, as_json))
            continue
        if not wait:
            print(json.dumps({"source": image, "id": job.id}) if as_json else job.id)
            continue
        jobs.append((image, job))
        if len(jobs) > MOST_OPEN:
            code = _first(code, take())
    while jobs:
        code = _first(code, take())
    if not seen and not as_json:
        errors.print("no image came from stdin: give one a line", style="yellow")
    raise typer.Exit(code)


def _first(code: int, other: int) -> int:
    return code or other


def _ended(image: str, job: Job[Any], timeout: float, as_json: bool) -> int:
    info = job.wait(timeout)
    if as_json:
        described = info.model_dump(mode="json", exclude_none=True)
        print(json.dumps({"source": image, **described}, ensure_ascii=False), flush=True)
    try:
        found = job.result(timeout=0)
    except JobEnded as error:
        return exit_code(error) if as_json else _refused(image, error, as_json)
    if not as_json:
        for line in lines_of(found):
            out.print(f"{image}: {line}", markup=False)
    return 0


def _refused(image: str, error: BlipqError, as_json: bool) -> int:
    if as_json:
        described = {"source": image, "error": type(error).__name__, "message": str(error)}
        print(json.dumps(described, ensure_ascii=False), flush=True)
    else:
        errors.print(f"blipq: {image}: {error}", style="red", markup=False)
    return exit_code(error)
