"""How a worker with fronts is, as a whole."""

from collections.abc import Sequence

from blipq_worker.fronts.status import FrontStatus
from blipq_worker.process.registration import State
from blipq_worker.supervision.engine import EngineProcess
from blipq_worker.supervision.front import FrontProcess


class Whole:
    """Adds up what the engine and the fronts say. Thread-safe: it only reads."""

    def __init__(self, engine: EngineProcess, fronts: Sequence[FrontProcess]) -> None:
        self.engine = engine
        self.fronts = fronts
        #: Set where the worker as a whole takes no more jobs.
        self.draining = False

    def statuses(self) -> list[FrontStatus]:
        """What the living fronts say of themselves."""
        return [status for front in self.fronts if (status := front.status()) is not None]

    def state(self) -> State:
        """How it is, in sum: taking if any front is, draining if all are."""
        found = self.statuses()
        return State(
            threads=sum(each.threads for each in found),
            active=sum(each.active for each in found),
            taking=self.engine.serving and not self.draining and any(each.taking for each in found),
            draining=self._is_draining(found),
            # A front alone with large pictures does not hold up the others.
            decode_bound=bool(found) and all(each.decode_bound for each in found),
        )

    def live_fronts(self) -> int:
        """Fronts whose processes run."""
        return sum(front.pid is not None for front in self.fronts)

    def problem(self, check: str) -> str | None:
        """Why no front is ready, by what the fronts have checked; None while one is."""
        found = self.statuses()
        if any(not each.problems for each in found):
            return None
        problems = (
            f"front {each.number}: {each.problems[check]}"
            for each in found
            if check in each.problems
        )
        return next(problems, None)

    def fronts_problem(self) -> str | None:
        """Why no front is ready, in a word."""
        found = self.statuses()
        if any(not each.problems for each in found):
            return None
        return "none is ready" if found else "none has started yet"

    def stuck_front(self) -> str | None:
        """What is wrong with a front that only its end would mend."""
        problems = (
            f"front {each.number}: {check}: {problem}"
            for each in self.statuses()
            for check, problem in each.live.items()
        )
        return next(problems, None)

    def _is_draining(self, found: Sequence[FrontStatus]) -> bool:
        if self.draining or self.engine.refusal is not None:
            return True
        return bool(found) and all(each.draining for each in found)
