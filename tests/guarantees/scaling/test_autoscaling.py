"""A simulated KEDA scales real workers on the exporter's predicted work: from zero and back."""

import functools
from collections.abc import Iterator

import pytest
import yaml
from benchmarks import workers
from benchmarks.autoscale.autoscaler import Autoscaler, Scaling
from benchmarks.autoscale.fleet import SETTINGS, Fleet, work_s
from benchmarks.autoscale.simulation import TIMES, Burst, Simulation

from blipq import Job, Status
from blipq.ledger.connection import connect
from blipq.local.stack import free_port
from blipq.local.supervisor import Service
from conftest import ROOT, wait_until
from guarantees.rig import Rig
from guarantees.stand_ins.forked import Forked

#: A quarter of an hour of the chart's settings in less than half a minute.
SPEED = 40
#: A burst onto nothing; long jobs, one at a time, while three of four workers have become idle; a
#: burst of which all shapes are known.
BURSTS = [
    Burst(0, captions=24, questions=6),
    *(Burst(5 + number, questions=1) for number in range(11)),
    Burst(17, captions=12, questions=8),
]


@pytest.fixture
def exporter(rig: Rig) -> Iterator[int]:
    """Its port."""
    port = free_port()
    exporter = rig.command("metrics", "--port", str(port))
    exporter.start()
    try:
        wait_until(lambda: _answers(port), "the exporter")
        yield port
    finally:
        exporter.stop()


def _answers(port: int) -> bool:
    try:
        return work_s(port) >= 0
    except OSError:
        return False


def _starter(rig: Rig) -> "functools.partial[Service]":
    return functools.partial(_start, rig)


def _start(rig: Rig, host: str) -> Service:
    own = {"BENCH_HOST": host, "BLIPQ_MODELS": f"default={TIMES}", "OMP_NUM_THREADS": "1"}
    environment = rig.stack.environment() | SETTINGS | own
    main = functools.partial(workers.main, "sleeping")
    worker = Forked(host, main, env=environment, log=rig.folder / f"{host}.log")
    worker.start()
    return worker


def test_a_fleet_grows_from_nothing_and_shrinks_to_it_and_its_busy_workers_go_last(
    rig: Rig, exporter: int
) -> None:
    scaling = Scaling().faster(SPEED)
    with connect(rig.settings) as raw:
        fleet = Fleet(raw, _starter(rig))
        work = functools.partial(work_s, exporter)
        simulation = Simulation(rig.client, rig.image, fleet, scaling, work, work)
        try:
            outcome = simulation.run(BURSTS, limit_s=120)
        finally:
            fleet.close()
    assert outcome.failed() == []
    assert max(outcome.pods) == scaling.max
    assert (outcome.pods[0], outcome.pods[-1]) == (0, 0)
    assert outcome.stopped > scaling.max, "the fleet has shrunk while there was work"
    assert outcome.wronged == []
    # The first burst met a model that had never run: each job was guessed to take a second.
    _, known = outcome.predictions
    assert known.seconds == pytest.approx(outcome.took_s(known), rel=0.25)


def test_of_two_workers_the_idle_one_is_stopped_though_it_is_older(rig: Rig) -> None:
    with connect(rig.settings) as raw:
        fleet = Fleet(raw, _starter(rig))
        try:
            fleet.scale(2)
            wait_until(lambda: len(rig.operator.workers()) == 2, "two workers", timeout=60)
            job = _busy(rig, fleet, "pod-2")
            costs = {"pod-1": "0", "pod-2": "1"}
            wait_until(lambda: _written(fleet) == costs, "deletion costs that follow")
            fleet.scale(1)
            assert [pod.name for pod in fleet.pods] == ["pod-2"]
            assert job.wait(30).status is Status.SUCCEEDED
        finally:
            fleet.close()


def _busy(rig: Rig, fleet: Fleet, name: str) -> Job[object]:
    """A job of six seconds that this one of two workers has taken."""
    for number in range(12):
        (request,) = Burst(number, questions=1).requests(rig.image)
        questions = tuple(f"{number}, {n}?" for n in range(60))
        job = rig.client.submit(request.model_copy(update={"questions": questions}))
        wait_until(fleet.held, "a worker that has it")
        if name in fleet.held():
            return job
        job.cancel()
        wait_until(lambda: not fleet.held(), "an idle fleet")
    raise AssertionError("the other one took all jobs")


def _written(fleet: Fleet) -> dict[str, str | None]:
    fleet.write_costs()
    return dict(fleet.costs())


def test_the_simulation_scales_as_the_chart_does() -> None:
    values = yaml.safe_load((ROOT / "deploy/helm/blipq/values.yaml").read_text())
    scaling, chart = Scaling(), values["workerDefaults"]["scaling"]
    assert (scaling.max, scaling.target) == (chart["max"], chart["targetSeconds"])
    assert scaling.cooldown_s == chart["cooldownSeconds"]
    assert scaling.polling_s == values["keda"]["pollingSeconds"]


def test_an_autoscaler_goes_up_at_once_and_down_one_at_a_time_after_the_window() -> None:
    scaling = Scaling()
    autoscaler = Autoscaler(scaling)
    pods, seen = 0, []
    for now in range(0, 1500, 15):
        work = 0.0 if now < 15 or now >= 600 else 170.0 if now < 60 else 20.0
        pods = autoscaler.pods(now, pods, work)
        if not seen or seen[-1][1] != pods:
            seen.append((now, pods))
    assert seen == [(0, 0), (15, 1), (30, 3), (360, 2), (420, 1), (1185, 0)]
