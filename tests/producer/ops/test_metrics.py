"""What Prometheus reads of the ledger and of a sender, over real HTTP from a real Redis."""

import json
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from urllib.error import HTTPError

import pytest
import redis
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from blipq import Client, InvalidRequest, Settings
from blipq.contract import CaptionRequest
from blipq.exporter import served
from blipq.ledger.connection import connect
from blipq.ledger.operator import OperatorLedger
from blipq.ops import metrics
from blipq.ops.metrics import LedgerCollector
from blipq.ops.outlook import work_page
from blipq.webhooks.outbox import Outbox
from conftest import ledger_of

IMAGE = "s3://uploads/cat.jpg"
Scrape = Callable[[], dict[str, float]]


def scraped(port: int) -> dict[str, float]:
    """Samples by name, with the values of their labels behind it."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        families = list(text_string_to_metric_families(answer.read().decode()))
    return {
        " ".join([sample.name, *sample.labels.values()]): sample.value
        for family in families
        for sample in family.samples
    }


@pytest.fixture
def scrape(apart: Settings) -> Iterator[Scrape]:
    registry = CollectorRegistry()
    with connect(apart) as raw, served(registry, 0) as port:
        registry.register(LedgerCollector(raw))
        assert port is not None
        yield lambda: scraped(port)


def test_who_lives_is_found_without_a_walk_over_all_keys(
    apart: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A million jobs that are kept made each scrape a thousand round trips."""
    commands: list[str] = []
    execute = redis.Redis.execute_command

    def noted(client: "redis.Redis", *command: Any, **options: Any) -> Any:
        commands.append(str(command[0]))
        return execute(client, *command, **options)

    monkeypatch.setattr(redis.Redis, "execute_command", noted)
    with connect(apart) as raw, Client(apart) as client:
        ledger_of(client).register("w1", ["default"], ttl_s=30, spare=True, info='{"pid": 1}')
        outbox = Outbox(raw, apart)
        outbox.register("s1", 30)
        raw.zadd("blipq:senders", {"dead": 1})
        assert OperatorLedger(raw, apart).workers() == {"w1": {"pid": 1}}
        assert outbox.senders() == ["s1"]
        told = {family.name: family for family in LedgerCollector(raw).collect()}
        assert told["blipq_webhook_senders"].samples[0].value == 1
    assert "SCAN" not in commands
    assert "ZCOUNT" in commands


def test_the_exporter_counts_what_the_ledger_holds(apart: Settings, scrape: Scrape) -> None:
    with Client(apart) as client:
        webhook = {"url": "https://example.org/"}
        first = client.caption(IMAGE, webhook=webhook)
        client.caption(IMAGE, priority="high")
        client.caption(IMAGE, model="other")
        ledger_of(client).claim(first.id, "w1")
        ledger_of(client).register("w1", ["default"], ttl_s=30, spare=True, info="{}")
        told = scrape()
        assert told["blipq_ledger_up"] == 1
        assert (told["blipq_jobs_open"], told["blipq_jobs_running"]) == (3, 1)
        assert told["blipq_jobs_queued blipq.default.high"] == 1
        assert told["blipq_jobs_queued blipq.default.normal"] == 0
        assert told["blipq_jobs_queued blipq.other.normal"] == 1
        assert 0 <= told["blipq_oldest_queued_seconds blipq.other.normal"] < 60
        assert told["blipq_oldest_queued_seconds blipq.default.normal"] == 0
        assert (told["blipq_workers default"], told["blipq_workers other"]) == (1, 0)
        assert (told["blipq_dead_letters"], told["blipq_webhooks_pending"]) == (0, 0)
        first.cancel()
        assert scrape()["blipq_webhooks_pending"] == 1


def test_an_empty_ledger_has_no_queues(scrape: Scrape) -> None:
    told = scrape()
    assert told["blipq_jobs_open"] == 0
    assert not [name for name in told if name.startswith("blipq_jobs_queued")]


def test_without_redis_the_exporter_says_so_and_goes_on() -> None:
    registry = CollectorRegistry()
    registry.register(LedgerCollector(redis.Redis(port=1)))
    with served(registry, 0) as port:
        assert port is not None
        assert scraped(port) == {"blipq_ledger_up": 0}


def test_a_port_that_is_taken_is_told() -> None:
    told = "Address already in use: name another port"
    with served(CollectorRegistry(), 0) as port, pytest.raises(InvalidRequest, match=told) as error:
        served(CollectorRegistry(), port).__enter__()
    assert str(port) in str(error.value)


def test_metrics_may_be_open_at_one_address_alone() -> None:
    with served(CollectorRegistry(), 0, "127.0.0.1") as port:
        assert port is not None
        assert scraped(port) == {}
        with socket.socket() as other:
            other.bind(("127.0.0.2", port))  # free: nothing listens at all addresses
    with pytest.raises(InvalidRequest, match=r"192\.0\.2\.1"):
        served(CollectorRegistry(), 0, "192.0.2.1").__enter__()


def test_the_command_serves_until_sigterm(apart: Settings) -> None:
    command = [sys.executable, "-m", "blipq", "metrics", "--port", "0"]
    environment = {"BLIPQ_REDIS_URL": apart.redis_url}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stderr is not None
        line = process.stderr.readline()
        assert scraped(int(line.rsplit(" ", 1)[1]))["blipq_ledger_up"] == 1
        process.terminate()
        assert process.wait(20) == 0


def test_the_exporter_says_what_work_is_ahead(apart: Settings, scrape: Scrape) -> None:
    with Client(apart) as client:
        ledger = ledger_of(client)
        ran = ["default", "caption.1.8.32.0", 4, 2000.0, 0, 0.0, 8000.0]
        used = [["default", "shop", 1500.0], ["default", "", 500.0]]
        for _ in range(2):
            ledger.learn(json.dumps({"ran": [ran], "used": used}))
        first, _, _ = (client.caption(IMAGE) for _ in range(3))
        ledger.claim(first.id, "w1")
        told = scrape()
        assert told["blipq_backlog_gpu_seconds default waiting"] == pytest.approx(1)
        assert told["blipq_backlog_gpu_seconds default running"] == pytest.approx(0.5)
        assert told["blipq_prediction_error_ratio default"] == 0
        assert told["blipq_gpu_seconds_total default shop"] == 3
        assert told["blipq_gpu_seconds_total default "] == 1
        assert told["blipq_redis_memory_bytes"] > 0


def test_an_autoscaler_reads_the_work_of_a_model_as_json(apart: Settings) -> None:
    with Client(apart) as client, connect(apart) as raw:
        client.caption(IMAGE)
        pages = {"work": partial(work_page, [raw])}
        with served(CollectorRegistry(), 0, "127.0.0.1", pages) as port:

            def work(model: str) -> object:
                url = f"http://127.0.0.1:{port}/work/{model}"
                with urllib.request.urlopen(url, timeout=10) as answer:
                    return json.load(answer)

            assert work("default") == {"waiting_s": 1, "running_s": 0, "total_s": 1}
            assert work("no.body") == {"waiting_s": 0, "running_s": 0, "total_s": 0}


def test_an_autoscaler_is_not_told_of_no_work_while_redis_is_away() -> None:
    pages = {"work": partial(work_page, [redis.Redis(port=1)])}
    with served(CollectorRegistry(), 0, "127.0.0.1", pages) as port:
        with (
            pytest.raises(HTTPError) as error,
            urllib.request.urlopen(f"http://127.0.0.1:{port}/work/default", timeout=10),
        ):
            pass
        with error.value:
            assert error.value.code == 503


def test_a_scrape_never_scans_the_keys(apart: Settings, scrape: Scrape) -> None:
    with Client(apart) as client, connect(apart) as raw:
        client.caption(IMAGE)
        Outbox(raw, apart).register("s1", 30)
        raw.config_resetstat()
        assert scrape()["blipq_webhook_senders"] == 1
        commands = {name.upper() for name in raw.info("commandstats")}
        assert not {name for name in commands if "SCAN" in name or "KEYS" in name}


def test_tenants_are_counted_and_those_with_few_open_jobs_together(
    apart: Settings, scrape: Scrape, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "MOST_TENANTS", 2)
    with Client(apart) as client:
        for tenant, count in (("shop", 3), ("zoo", 2), ("a", 1), ("b", 1), (None, 1)):
            request = CaptionRequest.model_validate({"image": IMAGE})
            client.submit_many([request] * count, tenant=tenant)
        told = scrape()
        open_ = {name: value for name, value in told.items() if "tenant_jobs_open" in name}
        assert open_ == {
            "blipq_tenant_jobs_open shop": 3,
            "blipq_tenant_jobs_open zoo": 2,
            "blipq_tenant_jobs_open ~others": 2,
        }
        assert 0 < told["blipq_tenant_oldest_seconds shop"] < 60
        assert 0 < told["blipq_tenant_oldest_seconds ~others"] < 60
