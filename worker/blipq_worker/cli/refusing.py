"""What commands about models share: their errors, and options that must be one of a few words."""

import importlib.util
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, get_args

import typer

from blipq.cli.terminal.output import errors, exit_code, named_files
from blipq.errors import BlipqError, InvalidRequest
from blipq.local.worker import NO_WORKER
from blipq_worker.catalog.models import ModelError


@contextmanager
def refused(as_json: bool = False) -> Iterator[None]:
    """Any error is one line on stderr (or JSON) and the exit code 2, or 7 where nothing answers."""
    try:
        with named_files():
            yield
    except BlipqError as error:
        if as_json:
            print(json.dumps({"error": type(error).__name__, "message": str(error)}))
        else:
            errors.print(f"blipq models: {error}", markup=False)
        raise typer.Exit(max(2, exit_code(error))) from None


def one_of(option: str, given: str, literal: Any) -> Any:
    """What was given, if the type ``Literal[...]`` has it. Raises InvalidRequest."""
    known = get_args(literal)
    if given not in known:
        raise InvalidRequest(f"{option}: {given!r} is none of {', '.join(known)}")
    return given


def require_torch(what: str) -> None:
    """Raises ModelError where torch is missing."""
    if importlib.util.find_spec("torch") is None:
        raise ModelError(f"{what} needs torch; {NO_WORKER}")
