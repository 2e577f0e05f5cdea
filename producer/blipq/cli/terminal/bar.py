"""A bar for bulks: how much has ended, how fast it goes, when it will be done."""

import time
from types import TracebackType

from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from blipq.bulk.driver import Driver
from blipq.cli.terminal.output import errors

#: Where there is no terminal, for logs.
LINE_EVERY_S = 30.0


class _Rate(ProgressColumn):
    """Lines that ended per second, lately."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:,.1f}/s" if speed else "", style="dim")


class Bar:
    """Shows a driver's progress on stderr: a bar on a terminal, else a line now and then.

    How many lines there are is estimated from how many bytes those took that were read.
    """

    def __init__(self, size: int | None, *, shown: bool) -> None:
        self._size = size
        self._lines = shown and not errors.is_terminal
        self._told_at = time.monotonic()
        self._progress = Progress(
            BarColumn(),
            TextColumn("{task.description}", markup=False),
            _Rate(),
            TimeRemainingColumn(),
            console=errors,
            disable=not (shown and errors.is_terminal),
            speed_estimate_period=30,
        )
        self._task = self._progress.add_task("", total=None)

    def __enter__(self) -> "Bar":
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def show(self, driver: Driver) -> None:
        """Takes in how far the driver is."""
        ended = sum(driver.counts.values())
        failed = ended - driver.counts.get("succeeded", 0)
        text = f"{ended:,} ended, {driver.in_flight:,} in flight"
        text += f", {failed:,} failed" if failed else ""
        text += f" ({driver.trouble})" if driver.trouble else ""
        if self._lines and time.monotonic() - self._told_at >= LINE_EVERY_S:
            self._told_at = time.monotonic()
            errors.print(text, style="dim", markup=False)
        self._progress.update(
            self._task, description=text, completed=ended, total=self._total(driver)
        )

    def _total(self, driver: Driver) -> float | None:
        if driver.exhausted:
            return sum(driver.counts.values()) + driver.in_flight
        if not self._size or not driver.lines:
            return None
        return driver.lines * self._size / int(driver.position)
