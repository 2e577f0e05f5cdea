"""What becomes of a job's items when the engine dies in between."""

import threading
from concurrent.futures import Future
from typing import Any

import pytest

from blipq_worker.claims import Held
from blipq_worker.inference.interface import EngineGone
from blipq_worker.inference.requests import Answer, Generate, GenerationParams, ImagePixels
from blipq_worker.jobs.asker import Asker
from blipq_worker.jobs.errors import EngineLost
from blipq_worker.kinds.spec import Part
from blipq_worker.receipt import Stopwatch
from worker.fronts.test_holdings import claim_of
from worker.inference.stand_in import INFO

IMAGE = ImagePixels("a" * 64)


class Dying:
    """An engine that dies once it has some items: each fails as it is told, one after the other.

    fates: whether a pass with the item had begun; None: sending it fails, as to a closed socket.
    """

    def __init__(self, *fates: bool | None) -> None:
        self._fates = list(fates)
        self._sent: list[tuple[Future[Answer], bool]] = []
        self.alone: list[bool] = []

    def model(self, name: str) -> Any:
        return INFO

    def check(self, model: str, item: Any) -> None:
        """Anything will do."""

    def submit(self, *_: Any, alone: bool, **__: Any) -> "Future[Answer]":
        self.alone.append(alone)
        fate = self._fates.pop(0)
        future: Future[Answer] = Future()
        if fate is not None:
            self._sent.append((future, fate))
        if not self._fates or fate is None:
            threading.Timer(0.05, self._die).start()
        if fate is None:
            raise EngineGone("sending failed")
        return future

    def _die(self) -> None:
        for future, started in self._sent:
            if not future.cancelled():
                future.set_exception(EngineGone("it died", started=started))


def asked(engine: Dying, *, solo: bool = False) -> EngineLost:
    held, claim = Held(), claim_of("a", solo=solo)
    held.add(claim)
    watch = Stopwatch(queue_ms=0, worker="w1")
    inference: Any = engine
    asker = Asker(inference, claim, held, watch, 10.0, reload=lambda: IMAGE)
    item = Generate(IMAGE, ("a",), GenerationParams())
    part: Part[Any] = Part("generate", item, lambda value: value)
    with pytest.raises(EngineLost) as caught:
        asker.all([part] * len(engine._fates))
    return caught.value


@pytest.mark.parametrize(
    ("fates", "started"),
    [
        ((False,), False),
        ((True,), True),
        ((False, False), False),
        ((True, False), True),
        ((False, False, True), True),  # the first that is waited for had not begun
        ((True, None), True),  # the engine died of the first while the second was sent
        ((False, None), False),
    ],
)
def test_a_job_is_suspect_if_a_pass_had_begun_with_any_of_its_items(
    fates: tuple[bool | None, ...], started: bool
) -> None:
    assert asked(Dying(*fates)).started is started


@pytest.mark.parametrize("solo", [False, True])
def test_the_items_of_a_job_in_quarantine_run_alone_in_the_engine(solo: bool) -> None:
    engine = Dying(False, False)
    asked(engine, solo=solo)
    assert engine.alone == [solo, solo]
