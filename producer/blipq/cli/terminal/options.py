"""The options of every job and of every wait, declared once, and what makes a verb a command."""

import inspect
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer

from blipq.cli.terminal.output import JsonOption, connected, follow
from blipq.cli.terminal.several import Several, follow_all
from blipq.client.job import Job
from blipq.client.sync_client import Client
from blipq.contract import Priority
from blipq.errors import InvalidRequest

_PANEL = "Options of every job"

TimeoutOption = Annotated[
    float, typer.Option(help="Longest wait for the result, in seconds.", min=0, metavar="SECONDS")
]


def _option(help: str, *names: str, metavar: str | None = None) -> Any:
    return typer.Option(*names, help=help, metavar=metavar, rich_help_panel=_PANEL)


def job_options(
    *,
    model: Annotated[str, _option("Served model.")] = "default",
    priority: Annotated[Priority, _option("Served round robin.")] = Priority.NORMAL,
    expires_in: Annotated[str | None, _option("Deadline, such as 90s, 10m or 2d.")] = None,
    idempotency_key: Annotated[str | None, _option("The same key gives the same job.")] = None,
    output: Annotated[str | None, _option("s3:// object to write the result to.")] = None,
    keep: Annotated[
        str | None, _option("How long the job is kept once it has ended, such as 1h.")
    ] = None,
    webhook: Annotated[
        str | None, _option("Where to post the job's end, signed.", metavar="URL")
    ] = None,
    metadata: Annotated[
        list[str] | None,
        _option("Comes back with the job; may be repeated.", metavar="NAME=VALUE"),
    ] = None,
) -> dict[str, Any]:
    """The options as fields of ``Options``. Raises InvalidRequest."""
    return {
        "model": model,
        "priority": priority,
        "expires_in": expires_in,
        "idempotency_key": idempotency_key,
        "output": output,
        "keep": keep,
        "webhook": {"url": webhook} if webhook else None,
        "metadata": pairs(metadata, "--metadata"),
    }


def _waiting(
    *,
    timeout: TimeoutOption = 60.0,
    wait: Annotated[
        bool, typer.Option("--wait/--no-wait", help="Wait for the result, or print the id.")
    ] = True,
    as_json: JsonOption = False,
) -> None:
    """Options of commands that wait for what they submit."""


Then = Callable[[Job[Any]], None]


def verb(
    submit: Callable[..., Job[Any] | Several | tuple[Job[Any], Then | None]],
) -> Callable[..., None]:
    """A command that submits a job and follows it.

    ``submit`` takes a client, the command's own arguments and the options of every job; the command
    takes all but the client from the command line. It may also say what is done with the job then,
    or answer with several images.
    """

    def command(*, timeout: float, wait: bool, as_json: bool, **given: Any) -> None:
        options = {name: given.pop(name) for name in inspect.signature(job_options).parameters}
        with connected(as_json) as client:
            submitted = submit(client, **given, **job_options(**options))
            if isinstance(submitted, Several):
                follow_all(submitted, wait, timeout, as_json)
                return
            job, then = submitted if isinstance(submitted, tuple) else (submitted, None)
            follow(job, wait, timeout, as_json)
            if then is not None and wait:
                then(job)

    parameters = parameters_of(submit, job_options, _waiting)
    command.__name__, command.__doc__ = submit.__name__, submit.__doc__
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {each.name: each.annotation for each in parameters}
    return command


def parameters_of(*functions: Callable[..., Any]) -> list[inspect.Parameter]:
    """The parameters of functions that come from the command line."""
    return [
        each.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        for function in functions
        for each in inspect.signature(function).parameters.values()
        if each.kind is not inspect.Parameter.VAR_KEYWORD and each.annotation is not Client
    ]


def pairs(texts: Sequence[str] | None, option: str) -> dict[str, str] | None:
    """``NAME=VALUE`` texts as a dictionary. Raises InvalidRequest."""
    if not texts:
        return None
    split = [text.partition("=") for text in texts]
    wrong = [name for name, equals, _ in split if not equals]
    if wrong:
        raise InvalidRequest(f"{option}: {wrong[0]!r} is not of the form NAME=VALUE")
    return {name.strip(): value.strip() for name, _, value in split}
