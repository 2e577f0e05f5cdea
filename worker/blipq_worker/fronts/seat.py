"""A front's place in its worker: its number, and the files that it shares with the main process."""

from dataclasses import dataclass
from pathlib import Path

#: The engine is gone: the front is to be started again, and waits for the next one.
EXIT_ENGINE_GONE = 75
#: Celery's remote control has ended the front: its whole worker is to end.
EXIT_SHUT_DOWN = 79


@dataclass(frozen=True, slots=True)
class Seat:
    """A front's place.

    folder: the worker's run folder. number: of this front, from 1 to ``of``.
    worker: the name under which jobs are claimed.
    """

    folder: Path
    number: int
    of: int
    worker: str

    @property
    def socket(self) -> Path:
        """Where the engine listens."""
        return self.folder / "engine.sock"

    @property
    def metrics(self) -> Path:
        """The folder in which all fronts count."""
        return self.folder / "metrics"

    @property
    def status(self) -> Path:
        """The file in which the front says how it is: see ``status``."""
        return self.folder / f"front-{self.number}.json"

    @property
    def holdings(self) -> Path:
        """The file in which the front notes what it holds: see ``holdings``."""
        return self.folder / f"front-{self.number}.held"
