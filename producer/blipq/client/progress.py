"""A bar for those who wait for many jobs."""

from contextlib import ExitStack
from types import TracebackType

from blipq.contract import JobInfo, Status


class Progress:
    """Counts jobs that have ended, and those of them that did not succeed, on stderr."""

    def __init__(self, total: int, *, shown: bool) -> None:
        self._total = total
        self._shown = shown
        self._failed = 0
        self._stack = ExitStack()

    def __enter__(self) -> "Progress":
        if self._shown:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[failed]}"))
            bar = Bar(*columns, TimeRemainingColumn(), console=Console(stderr=True))
            self._bar = self._stack.enter_context(bar)
            self._task = self._bar.add_task("jobs", total=self._total, failed="")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.close()

    def count(self, info: JobInfo) -> None:
        """One more job has ended."""
        self._failed += info.status is not Status.SUCCEEDED
        if self._shown:
            failed = f"{self._failed} without a result" if self._failed else ""
            self._bar.update(self._task, advance=1, failed=failed)
