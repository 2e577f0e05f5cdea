"""What every source of news has in common."""

from dataclasses import dataclass
from typing import Protocol

from blipq.watch.events import Notification
from blipq.watch.objects import Upload

Found = Notification | Upload


@dataclass
class Batch:
    """News of uploads. It is the source's until ``done``: if this process dies, it comes again."""

    found: list[Found]

    def hold(self) -> None:
        """It takes longer: nobody else is to get it meanwhile."""

    def done(self, refused: set[Found]) -> None:
        """Everything is recorded, but for ``refused``: what can never be."""


class Source(Protocol):
    """Where news of uploads comes from. Raises QueueUnavailable where it does not answer."""

    #: Seconds to wait after there was nothing.
    pause_s: float

    def next(self) -> Batch | None:
        """The next batch, or None if there is nothing for now."""

    def close(self) -> None:
        """Gives back what is not done."""
