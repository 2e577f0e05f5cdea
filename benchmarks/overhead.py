"""What the queue costs: jobs without a model and without S3, against a no-op Celery task."""

import gc
import sys
import time
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from celery import Celery, Task

from blipq.contract import CaptionRequest, Generation, ImageRef, Options
from blipq.ledger.connection import connect
from blipq.ledger.worker import Claim, WorkerLedger
from blipq.local.supervisor import Service
from blipq.settings import Settings
from blipq.submission import Submission, new_id
from blipq_worker.bench.stack import Meter, Stack, Through, running

SLEEPING = [sys.executable, "-m", "benchmarks.workers", "sleeping"]
AT_ONCE = {"BLIPQ_MODELS": "default=0+0"}
THREADS, WARM = 32, 100
GREEDY = Generation(num_beams=1, max_new_tokens=5)

celery_app = Celery("benchmarks.overhead")


@celery_app.task(name="noop")
def noop(number: int) -> int:
    return number


@celery_app.task(name="recorded")
def recorded(id: str) -> None:
    """What the ledger asks of a worker for each job: a claim and an outcome."""
    claim = _ledger().claim(id, "benchmark")
    assert isinstance(claim, Claim)
    _ledger().succeed(claim, '{"kind": "caption", "captions": [{"text": "a text"}]}', "{}")


@cache
def _ledger() -> WorkerLedger:
    settings = Settings()
    return WorkerLedger(connect(settings), settings)


def overhead(jobs: int) -> dict[str, Any]:
    """Jobs a second and CPU ms a job, blipq's and a no-op task's; and the wait for one alone."""
    with running() as stack:
        image = stack.upload([b"nothing"])[0]
        found: dict[str, Any] = {"noop": _celery(stack, noop, range(WARM + jobs))}
        found["recorded"] = _celery(stack, recorded, _prepared(stack, image, WARM + jobs))
        for name, fetch in (("blipq", "0"), ("blipq with S3", "1")):
            found[name] = _blipq(stack, jobs, _picture(stack) if fetch == "1" else image, fetch)
        stack.start_workers({**AT_ONCE, "BENCH_FETCH": "0"}, SLEEPING)
        found["idle"] = _alone(stack, image)
    found["ledger_cpu_ms"] = found["recorded"]["cpu_ms"] - found["noop"]["cpu_ms"]
    found["ratio"] = found["blipq"]["per_s"] / found["noop"]["per_s"]
    return found


def requests(image: ImageRef, count: int) -> list[CaptionRequest]:
    """Different prompts: equal jobs would be computed once."""
    return [
        CaptionRequest(image=image, prompt=f"number {n}", generation=GREEDY) for n in range(count)
    ]


def _picture(stack: Stack) -> ImageRef:
    from benchmarks.photos import pictures

    return stack.upload(pictures(6).take(1))[0]


def _blipq(stack: Stack, jobs: int, image: ImageRef, fetch: str) -> dict[str, Any]:
    environment = {**AT_ONCE, "BENCH_FETCH": fetch, "BLIPQ_CONCURRENCY": str(THREADS)}
    stack.start_workers(environment, SLEEPING)
    stack.backlog(requests(image, WARM))
    through: Through = stack.backlog(requests(image, jobs))
    stack.stop_workers()
    return {"per_s": through.per_s} | _costs(through.cpu_ms())


def _costs(ms: Mapping[str, float]) -> dict[str, float]:
    """The worker's and Redis' milliseconds a job."""
    return {"cpu_ms": ms["model"] + ms["others"], "redis_cpu_ms": ms["redis"]}


def _prepared(stack: Stack, image: ImageRef, jobs: int) -> list[str]:
    """Ids of jobs that are recorded, but published to no worker."""
    ledger = stack.client.ledger
    prepared = [
        ledger.prepare(Submission(each, Options(), new_id()), notify="benchmark")
        for each in requests(image, jobs)
    ]
    ledger.submit_all(prepared)
    return [each.submission.id for each in prepared]


def _celery(stack: Stack, task: Task, arguments: Sequence[Any]) -> dict[str, Any]:
    """A plain Celery task on the same pool and broker; results go to Redis, to wait for them."""
    url = stack.local.settings().redis_url.removesuffix("/0") + "/3"
    celery_app.conf.update(broker_url=url, result_backend=url, worker_prefetch_multiplier=1)
    command = [sys.executable, "-c", _CELERY_WORKER, url, str(THREADS)]
    log = stack.folder / "celery.log"
    worker = Service("celery", command, env=stack.local.environment(), log=log)
    worker.start()
    warm, work = arguments[:WARM], arguments[WARM:]
    try:
        _all([task.delay(each) for each in warm])
        started, meter = time.monotonic(), Meter([worker], stack.local.services)
        _all([task.delay(each) for each in work])
        took = time.monotonic() - started
        ms = {name: 1000 * each / len(work) for name, each in meter.read().items()}
        return {"per_s": len(work) / took} | _costs(ms)
    finally:
        gc.collect()  # results that go later would look for this Redis, which is gone by then
        worker.stop()


_CELERY_WORKER = """
import sys
from benchmarks.overhead import celery_app
url = sys.argv[1]
celery_app.conf.update(broker_url=url, result_backend=url, worker_prefetch_multiplier=1)
celery_app.worker_main(["worker", "--pool", "threads", "-c", sys.argv[2], "--loglevel", "ERROR"])
"""


def _all(results: Sequence[Any]) -> None:
    for result in results:
        result.get(timeout=120)


def _alone(stack: Stack, image: ImageRef, count: int = 100) -> dict[str, float]:
    waits = []
    for request in requests(image, count):
        started = time.monotonic()
        stack.client.submit(request).result(timeout=30)
        waits.append(time.monotonic() - started)
    waits.sort()
    return {"p50_ms": 1000 * waits[count // 2], "p99_ms": 1000 * waits[-2]}
