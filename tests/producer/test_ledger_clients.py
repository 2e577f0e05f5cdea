"""The ledger's clients: the same calls with and without an event loop, on Redis and in memory."""

import inspect
from typing import Any

import pytest

from blipq import Client, Settings
from blipq.ledger.async_producer import AsyncProducerLedger
from blipq.ledger.cells.async_producer import AsyncCellsLedger
from blipq.ledger.cells.producer import CellsLedger
from blipq.ledger.operator import OperatorLedger
from blipq.ledger.producer import ProducerLedger
from blipq.ledger.protocols import AsyncProducer, Producer
from blipq.ledger.worker import WorkerLedger
from blipq.testing import FakeBlipq
from blipq.testing.ledger import InMemoryAsyncLedger, InMemoryLedger


def calls(ledger: type) -> dict[str, Any]:
    """Signatures by name. To close has another name in an event loop."""
    methods = inspect.getmembers(ledger, inspect.isfunction)
    return {
        "close" if name == "aclose" else name: inspect.signature(method)
        for name, method in methods
        if not name.startswith("_")
    }


@pytest.mark.parametrize(
    "ledger",
    [
        AsyncProducer,
        ProducerLedger,
        AsyncProducerLedger,
        CellsLedger,
        AsyncCellsLedger,
        InMemoryLedger,
        InMemoryAsyncLedger,
    ],
)
def test_every_producers_ledger_has_the_same_calls(ledger: type) -> None:
    assert calls(ledger) == calls(Producer)


def test_a_worker_is_a_producer_too_and_an_operator_is_not() -> None:
    assert calls(WorkerLedger).items() > calls(Producer).items()
    assert set(calls(OperatorLedger)) & set(calls(Producer)) == {"read", "close"}


def test_an_operator_works_on_the_connections_of_a_client(apart: Settings) -> None:
    with Client(apart) as client:
        ledger = client.ledger
        assert isinstance(ledger, ProducerLedger)
        assert OperatorLedger.beside(ledger).redis is ledger.redis


def test_a_fake_has_no_operators_side() -> None:
    with Client(backend=FakeBlipq()) as client, pytest.raises(TypeError, match="no Redis"):
        OperatorLedger.beside(client.ledger)
