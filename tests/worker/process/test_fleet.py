"""How `blipq worker` shares a machine out between processes, and how they end."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from blipq.errors import InvalidRequest
from blipq.local.supervisor import Service
from blipq_worker.process import fleet
from conftest import wait_until


@pytest.fixture
def started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Service]:
    """The services that would be started, on a machine without a GPU."""
    started: list[Service] = []

    def run(services: Sequence[Service], *, drain_s: float) -> int:
        started.extend(services)
        return 0

    monkeypatch.setattr(fleet, "run_supervised", run)
    for name in ("OMP_NUM_THREADS", "BLIPQ_FRONTS", "BLIPQ_HEALTH_PORT", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("BLIPQ_QUANTIZATION", raising=False)
    monkeypatch.delenv("BLIPQ_DEVICE", raising=False)
    monkeypatch.setattr(fleet, "DEVICES", tmp_path)
    monkeypatch.setattr(fleet, "cores", lambda: 8)
    return started


def _values(services: Sequence[Service], name: str) -> list[str | None]:
    return [each.env.get(name) for each in services]


def test_processes_without_gpus_share_the_cores(started: list[Service]) -> None:
    assert fleet.run_many(None, 3) == 0
    assert [each.name for each in started] == ["worker, 1", "worker, 2", "worker, 3"]
    assert _values(started, "OMP_NUM_THREADS") == ["2", "2", "2"]


def test_more_processes_than_cores_have_one_each(started: list[Service]) -> None:
    fleet.run_many(None, 9)
    assert set(_values(started, "OMP_NUM_THREADS")) == {"1"}


def test_threads_that_are_set_stay_as_they_are(
    started: list[Service], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    fleet.run_many(None, 4)
    assert set(_values(started, "OMP_NUM_THREADS")) == {"3"}


def test_each_gpu_has_its_process_and_each_process_its_health_port(
    started: list[Service], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BLIPQ_HEALTH_PORT", "8080")
    fleet.run_many("0,2", 1)
    assert [each.name for each in started] == ["worker on GPU 0", "worker on GPU 2"]
    assert _values(started, "CUDA_VISIBLE_DEVICES") == ["0", "2"]
    assert _values(started, "BLIPQ_HEALTH_PORT") == ["8080", "8081"]
    assert _values(started, "OMP_NUM_THREADS") == [None, None]


def test_several_processes_of_each_gpu(started: list[Service]) -> None:
    fleet.run_many("1,0", 2)
    names = [f"worker on GPU {gpu}, {number}" for gpu in (1, 0) for number in (1, 2)]
    assert [each.name for each in started] == names
    assert _values(started, "CUDA_VISIBLE_DEVICES") == ["1", "1", "0", "0"]


@pytest.mark.parametrize(
    ("gpus", "processes", "fronts"),
    [("0", 1, None), ("0,1", 1, "3"), ("0,1", 2, "1"), ("0", 9, "1")],
)
def test_workers_on_gpus_share_the_cores_for_their_fronts(
    started: list[Service], gpus: str, processes: int, fronts: str | None
) -> None:
    fleet.run_many(gpus, processes)
    assert set(_values(started, "BLIPQ_FRONTS")) == {fronts}


@pytest.mark.parametrize(
    ("processes", "device", "fronts"),
    [(2, None, "3"), (9, None, "1"), (2, "cuda:1", "3"), (2, "cpu", None)],
)
def test_workers_on_the_one_gpu_of_a_host_share_its_cores_for_their_fronts(
    tmp_path: Path,
    started: list[Service],
    monkeypatch: pytest.MonkeyPatch,
    processes: int,
    device: str | None,
    fronts: str | None,
) -> None:
    """Nobody need name the GPU: each worker would have a front for every core but one."""
    (tmp_path / "nvidia0").touch()
    if device is not None:
        monkeypatch.setenv("BLIPQ_DEVICE", device)
    fleet.run_many(None, processes)
    assert set(_values(started, "BLIPQ_FRONTS")) == {fronts}


@pytest.mark.parametrize(
    ("gpus", "processes", "given", "kept"),
    [
        ("0,1", 1, None, None),
        ("0", 2, None, "nf4"),
        ("0", 2, "auto", "nf4"),
        ("0", 2, "none", "none"),
        (None, 2, None, "nf4"),
    ],
)
def test_workers_on_one_gpu_do_not_count_on_the_same_memory(
    tmp_path: Path,
    started: list[Service],
    monkeypatch: pytest.MonkeyPatch,
    gpus: str | None,
    processes: int,
    given: str | None,
    kept: str | None,
) -> None:
    (tmp_path / "nvidia0").touch()
    if given is not None:
        monkeypatch.setenv("BLIPQ_QUANTIZATION", given)
    fleet.run_many(gpus, processes)
    assert set(_values(started, "BLIPQ_QUANTIZATION")) == {kept}


def test_workers_on_a_cpu_keep_their_weights_in_full(started: list[Service]) -> None:
    fleet.run_many(None, 2)
    assert set(_values(started, "BLIPQ_QUANTIZATION")) == {None}


def test_workers_on_a_cpu_get_no_fronts(started: list[Service]) -> None:
    fleet.run_many(None, 2)
    assert set(_values(started, "BLIPQ_FRONTS")) == {None}


def test_fronts_that_are_set_stay_as_they_are(
    started: list[Service], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BLIPQ_FRONTS", "5")
    fleet.run_many("0,1", 1)
    assert set(_values(started, "BLIPQ_FRONTS")) == {"5"}


def test_gpus_are_named_by_their_indexes(started: list[Service]) -> None:
    with pytest.raises(InvalidRequest, match="--gpus takes 'all', or indexes"):
        fleet.run_many("first", 1)
    assert not started


def test_cores_are_those_that_the_process_may_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fleet, "CPU_QUOTA", tmp_path / "cpu.max")
    everything = len(os.sched_getaffinity(0))
    assert fleet.cores() == everything
    fleet.CPU_QUOTA.write_text("max 100000\n")
    assert fleet.cores() == everything
    fleet.CPU_QUOTA.write_text("150000 100000\n")
    assert fleet.cores() == 1
    fleet.CPU_QUOTA.write_text("50000 100000\n")
    assert fleet.cores() == 1


DRAINING = """
import signal, sys, time
path, seconds = sys.argv[1], float(sys.argv[2])
said = []
def on_signal(*_):
    said.append("told to stop")
    open(path, "a").write("told to stop\\n")
signal.signal(signal.SIGTERM, on_signal)
open(path, "a").write("ready\\n")
while not said:
    time.sleep(0.01)
time.sleep(seconds)
"""
FLEET = """
import sys
from blipq_worker.process.fleet import run_supervised
from blipq.local.supervisor import Service
paths = sys.argv[2:]
services = [
    Service(path, [sys.executable, "-c", sys.argv[1], path, seconds])
    for path, seconds in zip(paths, ("0.2", "1.0", "0.2"))
]
sys.exit(run_supervised(services, drain_s=20))
"""


def test_each_process_is_told_to_stop_once_and_may_end_in_its_own_time(tmp_path: Path) -> None:
    paths = [tmp_path / str(number) for number in range(3)]
    command = [sys.executable, "-c", FLEET, DRAINING, *map(str, paths)]
    fleet = subprocess.Popen(command)
    try:
        wait_until(lambda: all(path.exists() for path in paths), "the processes")
        fleet.terminate()
        assert fleet.wait(timeout=30) == 0
    finally:
        fleet.kill()
    assert [path.read_text() for path in paths] == ["ready\ntold to stop\n"] * 3
