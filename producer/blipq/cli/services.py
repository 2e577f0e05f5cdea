"""Commands that start and stop services."""

import json
import os
import signal
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from blipq.cli.terminal.output import JsonOption, errors, reported
from blipq.local.exports import as_shell, exports
from blipq.settings import Settings, read_stack_file
from blipq.submission import checked


def _port(help: str) -> Any:
    return typer.Option(help=help, min=1, max=65535, metavar="PORT")


def up(
    redis_port: Annotated[int | None, _port("Redis port.")] = None,
    s3_port: Annotated[int | None, _port("S3 port.")] = None,
    api_port: Annotated[int | None, _port("Port of the HTTP door.")] = None,
    folder: Annotated[
        Path | None, typer.Option(help="Where data and logs are kept.", file_okay=False)
    ] = None,
    worker: Annotated[bool, typer.Option(help="Also start a worker.")] = True,
) -> None:
    """Start a local stack: Redis, S3, a worker and the HTTP door. Ctrl-C stops it all.

    The door has a key of its own, which is shown when it is made and kept in the folder. Without
    blipq-api there is no door.

    Examples:
        blipq up
        blipq up --no-worker --folder /tmp/stack
    """
    from blipq.local import up as stack

    with reported():
        raise typer.Exit(stack.run(redis_port, s3_port, api_port, folder, with_worker=worker))


def down() -> None:
    """Stop the local stack that `blipq up` started.

    Examples:
        blipq down
    """
    stack = read_stack_file()
    if stack is None:
        errors.print("no local stack is running")
        return
    pid = int(stack["pid"])
    os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + 90
    # Its file goes first, its servers last: only the end of the process means that all is down.
    while (alive := _alive(pid)) and time.monotonic() < deadline:
        time.sleep(0.1)
    if alive:
        errors.print(f"the local stack (pid {pid}) is still draining")
        raise typer.Exit(1)
    errors.print("stopped")


def env(as_json: JsonOption = False) -> None:
    """Print how other programs reach Redis and S3.

    As variables for a shell, passwords included. For redis-cli, boto3, the AWS CLI, Celery, Flower
    and services in other languages: BLIPQ_*, AWS_* and CELERY_BROKER_URL, as the settings or the
    local stack say. With keys, an AWS session or profile of the shell is unset.

    Examples:
        eval "$(blipq env)"
        eval "$(blipq env)" && redis-cli -u "$BLIPQ_REDIS_URL" ping
        blipq env --json
    """
    with reported(as_json):
        variables = exports(checked(Settings))
        print(json.dumps(variables) if as_json else as_shell(variables))


def _alive(pid: int) -> bool:
    """Whether a process runs; one that ended and was not waited for does not."""
    try:
        os.kill(pid, 0)
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except ProcessLookupError:
        return False
    except OSError:  # no /proc here
        return True
    return state != "Z"
