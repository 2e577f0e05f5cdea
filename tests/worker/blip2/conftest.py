"""Trained models, beside the random ones."""

from collections.abc import Iterator

import pytest

from blipq_worker.blip2 import Blip2
from worker.in_flight import DEMO, T5_TWIN


@pytest.fixture(scope="module")
def demo() -> Iterator[Blip2]:
    """The demo model: trained, so that most of its texts come to an end."""
    return Blip2.load(str(DEMO), dtype="float32")


@pytest.fixture(scope="module")
def twin() -> Iterator[Blip2]:
    """Its T5 twin."""
    return Blip2.load(str(T5_TWIN), dtype="float32")


@pytest.fixture(params=["opt", "t5", "demo", "twin", "instructed_t5", "instructed_llama"])
def any_model(request: pytest.FixtureRequest) -> Blip2:
    """All families, with random and with trained weights."""
    model: Blip2 = request.getfixturevalue(request.param)
    return model
