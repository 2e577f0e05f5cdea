"""Scaling on predicted work against the queue's length: ``python -m benchmarks.autoscale``.

Real workers of a model that sleeps, and bursts of short jobs and of jobs that take four times as
long; the chart's times are divided by forty. Both start from nothing, meet the same bursts, and end
with nothing. ``--rounds`` of 75 seconds each; the four of a usual run take ten minutes for both.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from tools.docs.page import replace_section

from benchmarks import results
from benchmarks.autoscale.autoscaler import Scaling
from benchmarks.autoscale.fleet import SETTINGS, Fleet, work_s
from benchmarks.autoscale.simulation import LONG_S, SHORT_S, TIMES, Burst, Outcome, Simulation
from benchmarks.photos import pictures
from blipq.ledger import keys
from blipq.ledger.connection import connect
from blipq.local.stack import free_port, worker_service
from blipq.local.supervisor import Service
from blipq_worker.bench.stack import Stack, running

if TYPE_CHECKING:
    import redis

PAGE = Path(__file__).parents[2] / "docs" / "production.md"
SPEED = 40
#: Long jobs alone, short ones alone, and both; then a pause in which the fleet goes to nothing.
ROUND = [Burst(0, questions=16), Burst(12, captions=48), Burst(24, captions=16, questions=12)]
ROUND_S = 75.0
SHORT = sum(burst.captions for burst in ROUND)
LONG = sum(burst.questions for burst in ROUND)
MEAN_S = (SHORT * SHORT_S + LONG * LONG_S) / (SHORT + LONG)


def main() -> int:
    """Runs both, keeps their figures, and writes a section of docs/production.md."""
    parser = argparse.ArgumentParser("python -m benchmarks.autoscale", description=__doc__)
    parser.add_argument("--rounds", type=int, default=4)
    rounds = parser.parse_args().rounds
    found = results.measure(
        "autoscale",
        lambda: _measured(rounds),
        command=f"python -m benchmarks.autoscale --rounds {rounds}",
    )
    lines = [*_text(found), "", results.source("autoscale")]
    replace_section(PAGE, "autoscale", "\n".join(lines))
    print("\n".join(lines))
    return 0


def _measured(rounds: int) -> dict[str, Any]:
    bursts = [
        Burst(number * ROUND_S + each.at, each.captions, each.questions)
        for number in range(rounds)
        for each in ROUND
    ]
    return {on: _figures(_outcome(on, bursts)) for on in ("work", "length")}


def _text(found: Mapping[str, Any]) -> Iterator[str]:
    work, length = found["work"], found["length"]
    yield "| scaled on | jobs | failed | wait p50, s | wait p95, s | worker-seconds | stopped |"
    yield "|---|---|---|---|---|---|---|"
    for name, each in (("predicted work", work), ("the queue's length", length)):
        yield (
            f"| {name} | {each['jobs']} | {each['not_succeeded']} | {each['wait_p50_s']:.1f} | "
            f"{each['wait_p95_s']:.1f} | {each['worker_s']} | {each['stopped']} |"
        )
    yield ""
    off = max(abs(each) for each in (*work["predictions_off"], *length["predictions_off"]))
    busy = work["busy_stopped_beside_idle"] + length["busy_stopped_beside_idle"]
    yield (
        f"Busy pods that were stopped while another was idle: {busy}. Predicted work was at most "
        f"{off:.1%} off what it took."
    )


def _outcome(on: str, bursts: list[Burst]) -> Outcome:
    scaling = Scaling().faster(SPEED)
    with running() as stack, connect(stack.client.settings) as raw:
        port = free_port()
        command = [sys.executable, "-m", "blipq", "metrics", "--port", str(port)]
        exporter = Service("exporter", command, env=stack.local.environment(), log=None)
        exporter.start()
        fleet = Fleet(raw, partial(_start, stack))
        work, metric = partial(work_s, port), partial(work_s, port)
        if on == "length":
            # As many jobs for each worker as take the target on average.
            metric = partial(_length_s, raw)
        image = stack.upload(pictures(6).take(1))[0]
        simulation = Simulation(stack.client, image, fleet, scaling, metric, work)
        try:
            _wait_for(work)
            return simulation.run(bursts, limit_s=bursts[-1].at + 240)
        finally:
            fleet.close()
            exporter.stop()


def _start(stack: Stack, host: str) -> Service:
    own = {"BENCH_HOST": host, "BLIPQ_MODELS": f"default={TIMES}", "OMP_NUM_THREADS": "1"}
    worker = worker_service(
        {**stack.local.environment(), **SETTINGS, **own}, stack.folder / f"{host}.log"
    )
    worker.command = [sys.executable, "-m", "benchmarks.workers", "sleeping"]
    worker.start()
    return worker


def _wait_for(work: Callable[[], float], limit_s: float = 60.0) -> None:
    ending = time.monotonic() + limit_s
    while True:
        try:
            work()
        except OSError:
            if time.monotonic() > ending:
                raise
            time.sleep(0.1)
        else:
            return


def _length_s(client: "redis.Redis") -> float:
    """The queue's length, times what a job takes on average: the target is then one of length."""
    queues = keys.queues_of("default")
    return MEAN_S * sum(cast("int", client.zcard(keys.queued(queue))) for queue in queues)


def _figures(outcome: Outcome) -> dict[str, Any]:
    off = [each.seconds / outcome.took_s(each) - 1 for each in outcome.predictions]
    waits = outcome.waits()
    return {
        "jobs": len(outcome.infos),
        "not_succeeded": len(outcome.failed()),
        "wait_p50_s": round(waits[len(waits) // 2], 2),
        "wait_p95_s": round(outcome.p95_s(), 2),
        "worker_s": round(outcome.worker_s),
        "stopped": outcome.stopped,
        "busy_stopped_beside_idle": len(outcome.wronged),
        "predictions_off": [round(each, 4) for each in off],
        "pods": outcome.pods,
    }


if __name__ == "__main__":
    sys.exit(main())
