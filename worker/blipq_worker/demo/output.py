"""What the demo prints: how it goes on stderr, the outcome on stdout."""

import json

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn
from rich.table import Table
from rich.text import Text

from blipq_worker.demo.options import Options
from blipq_worker.demo.score import Run

errors = Console(stderr=True, highlight=False, soft_wrap=True)


class _Rate(ProgressColumn):
    """Answers a second since the start."""

    def render(self, task: Task) -> Text:
        """The rate as text."""
        rate = task.completed / task.elapsed if task.elapsed else 0.0
        return Text(f"{rate:.0f}/s", style="dim")


def progress() -> Progress:
    """The bar, on stderr."""
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Rate(), console=errors
    )


def print_line(text: str) -> None:
    """One line for the person at the terminal."""
    errors.print(text, style="dim", markup=False)


def print_error(error: Exception, as_json: bool) -> None:
    """Prints why there is no result."""
    if as_json:
        print(json.dumps({"error": type(error).__name__, "message": str(error)}))
    else:
        errors.print(f"blipq demo: {error}", style="red", markup=False)


def print_result(run: Run, options: Options) -> None:
    """Prints the outcome: one line of JSON, or a table and a sentence."""
    report = options.report.absolute()
    if options.as_json:
        print(json.dumps({**run.summary(), "report": str(report)}))
        return
    out = Console(highlight=False, soft_wrap=True)
    out.print(table(run))
    tally = run.tally
    verdict = f"{tally.right} of {tally.checked} answers right, {tally.failed} jobs failed"
    out.print(f"{verdict}, {run.images_per_second:.1f} images/s")
    out.print(f"report: {report.as_uri()}", markup=False)


def table(run: Run) -> Table:
    """Counts and times per kind, for the terminal."""
    grid = Table("kind", box=None, pad_edge=False, header_style="bold")
    for heading in ("jobs", "right", "wrong", "failed", "p50 ms"):
        grid.add_column(heading, justify="right")
    for kind, tally in [*run.tally.by_kind().items(), ("all", run.tally)]:
        counts = (tally.jobs, tally.right, tally.wrong, tally.failed)
        p50_ms = "-" if tally.p50_ms is None else f"{tally.p50_ms:.0f}"
        grid.add_row(kind, *map(str, counts), p50_ms, style="bold" if kind == "all" else "")
    return grid
