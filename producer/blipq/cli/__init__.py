"""The ``blipq`` command. Text for people on a terminal, ``--json`` for programs.

Exit codes: 0 success, 1 anything unexpected, 2 wrong usage or request, 3 the job failed (2 with the
code `invalid_request`), 4 no such job, 5 not ended in time, 6 cancelled or expired, 7 Redis or S3
does not answer or is full, 130 interrupted.
"""

from typing import Annotated

import typer

from blipq import __version__
from blipq.cli import commands
from blipq.cli.terminal.group import Group
from blipq.redaction import redact_tracebacks

app = Group(
    "Asynchronous BLIP-2 jobs: captions, answers and matches for images in S3.",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
commands.add_all(app)


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
    """Runs the ``blipq`` command."""
    redact_tracebacks()
    # Not app(): Typer's own call sets sys.excepthook anew, and a traceback would show passwords.
    typer.main.get_command(app)()
