"""The interface in one process behaves as the one with a socket does."""

from concurrent.futures import CancelledError
from contextlib import closing

import pytest

from blipq_worker.inference import (
    EngineGone,
    Failure,
    Generate,
    GenerationParams,
    ImagePixels,
    Inference,
    ItemFailed,
    LocalInference,
    UnknownModel,
)
from worker.inference.stand_in import INFO, MODELS, NAME, StandIn, item, pixels


@pytest.fixture
def held() -> StandIn:
    return StandIn(hold=True)


def test_an_item_is_answered() -> None:
    inference: Inference = LocalInference(StandIn())
    answer = inference.submit("default", item(5, name=NAME), "normal").result(0)
    assert answer.value.scores == (5, 5)  # type: ignore[union-attr]
    assert inference.knows("default", [NAME, "b" * 64], ["patches"]) == (True, False)
    assert inference.models() == MODELS
    assert inference.model("default") == INFO


def test_priority_and_deadline_reach_the_backend(held: StandIn) -> None:
    with closing(LocalInference(held)) as inference:
        inference.submit("default", item(), "low", 12.5)
        assert [met[2:] for met in held.met] == [("low", 12.5)]


def test_an_item_that_must_run_alone_says_so(held: StandIn) -> None:
    with closing(LocalInference(held)) as inference:
        inference.submit("default", item(), "low", alone=True)
        assert held.alone == [True]


def test_a_cancelled_future_ends_the_work_on_its_item(held: StandIn) -> None:
    with closing(LocalInference(held)) as inference:
        future = inference.submit("default", item(), "normal")
        future.cancel()
        assert held.cancelled == [0]


def test_an_item_that_is_given_up_is_cancelled(held: StandIn) -> None:
    with closing(LocalInference(held)) as inference:
        future = inference.submit("default", item(), "normal")
        held.cancel(0)
        with pytest.raises(CancelledError):
            future.result(0)


def test_a_failure_is_raised_whether_it_comes_at_once_or_later(held: StandIn) -> None:
    failure = Failure("permanent", "invalid_request", "too long")
    with closing(LocalInference(held)) as inference:
        future = inference.submit("default", item(), "normal")
        held.open.pop(0)[1](failure)
        with pytest.raises(ItemFailed, match="too long"):
            future.result(0)

    class Refusing(StandIn):
        def submit(self, *_: object) -> int:
            raise ItemFailed(failure)

    refused = LocalInference(Refusing()).submit("default", item(), "normal")
    with pytest.raises(ItemFailed, match="too long"):
        refused.result(0)


def test_what_a_socket_would_refuse_is_refused_here_too(held: StandIn) -> None:
    inference = LocalInference(held)
    with pytest.raises(UnknownModel):
        inference.submit("nobody", item(), "normal")
    for image, prompt in [
        (ImagePixels(None), "a"),
        (ImagePixels(None, False, (pixels(side=8),)), "a"),
        (ImagePixels(NAME), "x" * 40_000),
    ]:
        with pytest.raises(ValueError, match=r"."):
            inference.submit("default", Generate(image, (prompt,), GenerationParams()), "normal")
    assert held.met == []


def test_closing_fails_and_gives_up_what_is_open(held: StandIn) -> None:
    inference = LocalInference(held)
    future = inference.submit("default", item(), "normal")
    inference.close()
    with pytest.raises(EngineGone):
        future.result(0)
    assert held.cancelled == [0]
    with pytest.raises(EngineGone):
        inference.submit("default", item(), "normal")
