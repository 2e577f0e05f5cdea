"""The ``blipq`` command. Text for people on a terminal, ``--json`` for programs.

Exit codes: 0 success, 1 anything unexpected, 2 wrong usage or request, 3 the job failed (2 with the
code `invalid_request`), 4 no such job, 5 not ended in time, 6 cancelled or expired, 7 Redis or S3
does not answer or is full, 130 interrupted.
"""

from typing import Annotated

import typer

from blipq import __version__
from blipq.cli import (
    bulk,
    dead_letters,
    doctor,
    index,
    jobs,
    metrics,
    overview,
    plugins,
    search,
    services,
    watch,
    webhooks,
)
from blipq.cli.terminal.group import Group
from blipq.redaction import redact_tracebacks

app = Group(
    "Asynchronous BLIP-2 jobs: captions, answers and matches for images in S3.",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_ASK, _FOLLOW, _MANY = "Ask about an image", "Follow jobs", "Many images"
_RUN, _OPERATE = "Run it", "Operate it"

for command in (jobs.caption, jobs.vqa, jobs.match, jobs.embed, jobs.describe, search.search):
    app.command(rich_help_panel=_ASK)(command)
for command in (jobs.status, jobs.result, overview.wait, jobs.cancel):
    app.command(rich_help_panel=_FOLLOW)(command)
app.command("list", rich_help_panel=_FOLLOW)(overview.list_)
app.add_typer(bulk.app, name="bulk", rich_help_panel=_MANY)
app.command(rich_help_panel=_MANY)(watch.watch)
app.add_typer(index.app, name="index", rich_help_panel=_MANY)
plugins.add_command(app, "demo", panel=_RUN)
for command in (services.up, services.down, services.env):
    app.command(rich_help_panel=_RUN)(command)
plugins.add_command(app, "worker", panel=_RUN)
plugins.add_group(app, "models", panel=_RUN)
plugins.add_command(app, "bench", panel=_RUN)
app.command(rich_help_panel=_OPERATE)(doctor.doctor)
app.add_typer(overview.app, name="queue", rich_help_panel=_OPERATE)
app.add_typer(dead_letters.app, name="dead-letters", rich_help_panel=_OPERATE)
app.add_typer(webhooks.app, name="webhooks", rich_help_panel=_OPERATE)
app.command(rich_help_panel=_OPERATE)(metrics.metrics)


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
