"""Fault 19: the Redis server dies for good, and Sentinel makes its replica the master."""

import asyncio
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from blipq import AsyncClient, Client, JobNotFound, QueueUnavailable, Settings, Status
from blipq.local.stack import free_port, redis_command
from blipq.local.supervisor import Service
from conftest import wait_until
from guarantees.rig import Rig

DOWN_AFTER_MS = 1000


class Failover:
    """A replica of the rig's Redis, and three sentinels that watch both."""

    def __init__(self, rig: Rig, folder: Path) -> None:
        self.rig = rig
        self._folder = folder
        self._password = rig.stack._password
        self._ports = [free_port() for _ in range(3)]
        rig.redis(lambda raw: raw.config_set("masterauth", self._password))
        self._replica_port = free_port()
        self._start_replica()
        for port in self._ports:
            self._start_sentinel(port)
        wait_until(self._watched, "the sentinels", timeout=60)
        hosts = ",".join(f"127.0.0.1:{port}" for port in self._ports)
        self.url = f"sentinel://:{self._password}@{hosts}/0"
        rig.client.close()
        fields = rig.stack.settings_fields() | {"redis_url": self.url}
        rig.settings = Settings.model_validate(fields)
        rig.client = Client(rig.settings)

    def _start(self, name: str, *lines: str) -> None:
        folder = self._folder / name
        folder.mkdir()
        config = folder / "server.conf"
        config.write_text("\n".join(("bind 127.0.0.1", f"dir {folder}", *lines)) + "\n")
        command = [redis_command(), str(config), *(["--sentinel"] if "sentinel" in name else [])]
        service = Service(name, command, log=folder / "log")
        service.start()
        self.rig.stack.services.append(service)  # ends with them

    def _start_replica(self) -> None:
        master, password = self.rig.stack.redis_port, self._password
        self._start(
            "replica",
            f"port {self._replica_port}",
            f"requirepass {password}",
            f"masterauth {password}",
            f"replicaof 127.0.0.1 {master}",
            "repl-diskless-sync-delay 0",
        )
        wait_until(lambda: self.replica(lambda raw: raw.ping()), "the replica")
        wait_until(self._linked, "its first synchronization")

    def _start_sentinel(self, port: int) -> None:
        self._start(
            f"sentinel-{port}",
            f"port {port}",
            f"sentinel monitor mymaster 127.0.0.1 {self.rig.stack.redis_port} 2",
            f"sentinel auth-pass mymaster {self._password}",
            f"sentinel down-after-milliseconds mymaster {DOWN_AFTER_MS}",
            "sentinel failover-timeout mymaster 5000",
        )

    def replica(self, do: Any) -> Any:
        url = f"redis://:{self._password}@127.0.0.1:{self._replica_port}/0"
        with redis.Redis.from_url(url, decode_responses=True, socket_timeout=5) as raw:
            try:
                return do(raw)
            except redis.ConnectionError:
                return None

    def _linked(self) -> bool:
        info = self.replica(lambda raw: raw.info("replication"))
        return bool(info) and info.get("master_link_status") == "up"

    def _watched(self) -> bool:
        """Every sentinel knows the replica and the other two."""
        for port in self._ports:
            with redis.Redis(port=port, decode_responses=True, socket_timeout=5) as raw:
                try:
                    state = raw.execute_command("SENTINEL", "MASTER", "mymaster")
                except redis.RedisError:
                    return False
            if (int(state["num-slaves"]), int(state["num-other-sentinels"])) != (1, 2):
                return False
        return True

    def stop_replicating(self) -> None:
        """From now on the replica gets nothing more."""
        self.replica(lambda raw: raw.config_set("masterauth", "wrong"))
        self.rig.redis(lambda raw: raw.client_kill_filter(_type="replica"))
        wait_until(lambda: not self._linked(), "the replica to be cut off")

    def kill_the_master(self) -> None:
        self.rig.stack.services[0].signal(signal.SIGKILL)

    def start(self) -> None:
        """A planned failover, as for maintenance."""
        with redis.Redis(port=self._ports[0], decode_responses=True, socket_timeout=5) as raw:
            raw.execute_command("SENTINEL", "FAILOVER", "mymaster")

    def promoted(self) -> bool:
        info = self.replica(lambda raw: raw.info("replication"))  # None while it cannot be asked
        return bool(info) and info["role"] == "master"

    def settings_of_the_replica(self) -> Settings:
        url = f"redis://:{self._password}@127.0.0.1:{self._replica_port}/0"
        return Settings.model_validate(self.rig.stack.settings_fields() | {"redis_url": url})


@pytest.fixture
def failover(rig: Rig, tmp_path: Path) -> Iterator[Failover]:
    failover = Failover(rig, tmp_path)
    yield failover
    rig.settings = failover.settings_of_the_replica()  # for what the rig checks at its end


def test_a_failover_loses_only_what_was_not_replicated_and_its_submit_can_be_repeated(
    rig: Rig, failover: Failover
) -> None:
    worker = rig.start_worker(redis_url=failover.url)
    running = rig.submit("sleep 3")
    wait_until(lambda: rig.running() == 1, "the job to run")
    kept = rig.submit_all(["kept"] * 5)
    wait_until(lambda: failover.replica(lambda raw: raw.exists(f"blipq:job:{kept[-1].id}")), "it")
    failover.stop_replicating()
    unreplicated = rig.submit("unreplicated", idempotency_key="order-42", priority="low")
    failover.kill_the_master()
    with pytest.raises(QueueUnavailable):
        rig.submit("too early")
    wait_until(failover.promoted, "the failover", timeout=60)
    wait_until(rig.redis_answers, "the new master")
    rig.all_succeed([running, *kept], timeout=60)
    with pytest.raises(JobNotFound):
        unreplicated.info()
    again = rig.submit("unreplicated", idempotency_key="order-42", priority="low")
    rig.all_succeed([again, *rig.submit_all(["new"] * 5)], timeout=60)
    assert asyncio.run(_read(rig.settings, again.id)) is Status.SUCCEEDED
    assert worker.exit_code is None


def test_idle_workers_outlive_a_planned_failover(rig: Rig, failover: Failover) -> None:
    """The master is demoted, not killed: it unblocks its clients with an error, and refuses."""
    workers = [rig.start_worker(redis_url=failover.url) for _ in range(2)]
    rig.submit("before").result(20)
    failover.start()
    wait_until(failover.promoted, "the failover", timeout=60)
    wait_until(rig.redis_answers, "the new master")
    rig.all_succeed(rig.submit_all(["after"] * 8), timeout=60)
    assert [worker.exit_code for worker in workers] == [None, None]


async def _read(settings: Settings, id: str) -> Status:
    async with AsyncClient(settings) as client:
        return (await client.job(id).info()).status
