"""A bar for bulks: how much has ended, how fast it goes, when it will be done, and the newest."""

import time
from collections.abc import Callable, Iterable
from types import TracebackType

from rich.console import RenderableType
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
from blipq.cli.terminal.output import answer_line, errors

#: Where there is no terminal, for logs.
LINE_EVERY_S = 30.0
#: Leaves room for the rest of the line on a terminal of 80 columns.
BAR_WIDTH = 20


class _Rate(ProgressColumn):
    """Lines that ended per second, lately."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:,.1f}/s" if speed else "", style="dim")


class _WithLines(Progress):
    """A bar, and below it lines of text that are cut where the terminal ends."""

    below: tuple[str, ...] = ()

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        for line in self.below:
            yield Text(f"  {line}", style="dim", no_wrap=True, overflow="ellipsis")


class Bar:
    """Shows a driver's progress on stderr: a bar on a terminal, else a line now and then.

    share: how much of the lines lies before where a driver reads, 0 to 1; None if that is unknown.
    How many lines there are is estimated from it.
    """

    def __init__(self, share: Callable[[Driver], float | None], *, shown: bool) -> None:
        self._share = share
        self._lines = shown and not errors.is_terminal
        self._began = self._printed_at = time.monotonic()
        self._first: int | None = None
        self._progress = _WithLines(
            BarColumn(BAR_WIDTH),
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
        self._first = ended if self._first is None else self._first
        if self._lines and time.monotonic() - self._printed_at >= LINE_EVERY_S:
            self._printed_at = time.monotonic()
            rate = (ended - self._first) / (self._printed_at - self._began)
            more = [f"{text}, {rate:,.1f}/s", *_waits(driver)]
            errors.print("; ".join(more), style="dim", markup=False)
        self._progress.below = (*map(answer_line, driver.newest), *_waits(driver))
        self._progress.update(
            self._task, description=text, completed=ended, total=self._total(driver)
        )

    def _total(self, driver: Driver) -> float | None:
        open = driver.in_flight + driver.waiting
        if driver.exhausted:
            return sum(driver.counts.values()) + open
        share = self._share(driver)
        return driver.lines / share if share and driver.lines else None


def _waits(driver: Driver) -> Iterable[str]:
    """What keeps a driver from going faster."""
    if driver.paused:
        yield "paused: `blipq bulk resume` goes on"
    if driver.waiting:
        yield f"{driver.waiting:,} wait for web hosts that are visited often (--host-rate)"
    if driver.trouble:
        yield str(driver.trouble)
