"""The producer's side, measured: ``python benchmarks/clients.py submit | wait | idle``.

submit: jobs a second one by one, by many tasks at once and by ``submit_many``, in both clients.
wait: 10,000 jobs outstanding in one client: subscriptions, Redis commands and memory while nothing
ends, and commands per job while all of them do. idle: from a call to its result, one job at a time,
through a real worker with a model that takes no time.
"""

import argparse
import asyncio
import os
import platform
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import redis

from blipq import AsyncClient, CaptionRequest, Client, Settings
from blipq.ledger.connection import connect
from blipq.ledger.operator import OperatorLedger
from blipq.ledger.worker import Claim, WorkerLedger
from blipq.local.sample import red_square
from blipq.local.stack import LocalStack, free_port, redis_command
from blipq.local.supervisor import Service

ROOT = Path(__file__).parents[1]
ONE_BY_ONE, MANY = 2_000, 20_000
OUTSTANDING, QUIET_S = 10_000, 10.0
RESULT = '{"kind": "caption", "captions": [{"text": "a woman on a beach with a dog"}]}'


@contextmanager
def own_redis() -> Iterator[Settings]:
    """A Redis for this run alone."""
    port = free_port()
    settings = Settings(redis_url=f"redis://127.0.0.1:{port}/0", timeout_s=30)
    with tempfile.TemporaryDirectory() as folder:
        command = [redis_command(), "--port", str(port), "--dir", folder, "--save", ""]
        server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        try:
            with connect(settings) as raw:
                for _ in range(500):
                    with suppress(redis.ConnectionError):
                        raw.ping()
                        break
                    time.sleep(0.02)
            yield settings
        finally:
            server.terminate()
            server.wait()


def asked(number: int) -> CaptionRequest:
    """A request for a caption."""
    return CaptionRequest.model_validate({"image": f"s3://photos-of-the-shop/2026/{number}.jpg"})


def per_s(count: int, work: Callable[[], object]) -> float:
    """How often a second, after it was done ``count`` times."""
    started = time.perf_counter()
    work()
    return count / (time.perf_counter() - started)


def submit() -> None:
    """Prints jobs a second."""
    few, many = list(map(asked, range(ONE_BY_ONE))), list(map(asked, range(MANY)))
    with own_redis() as settings, Client(settings) as client:
        client.submit(few[0])
        one = per_s(ONE_BY_ONE, lambda: [client.submit(request) for request in few])
        all_at_once = per_s(MANY, lambda: client.submit_many(many))
    print(f"Client       one by one    {one:8,.0f} jobs/s")
    print(f"Client       submit_many   {all_at_once:8,.0f} jobs/s   {all_at_once / one:.1f}x")

    async def measured() -> None:
        async with AsyncClient(settings) as client:
            await client.submit(few[0])
            started = time.perf_counter()
            await asyncio.gather(*map(client.submit, few))
            together = ONE_BY_ONE / (time.perf_counter() - started)
            started = time.perf_counter()
            await client.submit_many(many)
            all_at_once = MANY / (time.perf_counter() - started)
        print(f"AsyncClient  {ONE_BY_ONE:,} tasks   {together:8,.0f} jobs/s")
        print(f"AsyncClient  submit_many   {all_at_once:8,.0f} jobs/s")

    with own_redis() as settings:
        asyncio.run(measured())


def wait() -> None:
    """Prints what many outstanding jobs take."""
    with own_redis() as settings, connect(settings) as raw, Client(settings) as client:
        jobs = client.submit_many(map(asked, range(OUTSTANDING)))
        ended = threading.Thread(target=lambda: list(client.as_completed(jobs, timeout=600)))
        before = _memory()
        ended.start()
        _report("Client.as_completed", raw, lambda: len(client.notifier), before)
        finish_all(settings, [job.id for job in jobs])
        ended.join()
        _report_end(raw)

    async def measured() -> None:
        async with AsyncClient(settings) as client:
            jobs = await client.submit_many(map(asked, range(OUTSTANDING)))
            before = _memory()
            results = asyncio.gather(*[job.result(timeout=600) for job in jobs])
            await asyncio.sleep(0)
            name, waiting = "AsyncClient, a task per job", lambda: len(client.notifier)
            await asyncio.to_thread(_report, name, raw, waiting, before)
            await asyncio.to_thread(finish_all, settings, [job.id for job in jobs])
            await results
            _report_end(raw)

    with own_redis() as settings, connect(settings) as raw:
        asyncio.run(measured())


def _report(name: str, raw: "redis.Redis", waiting: Callable[[], int], before: float) -> None:
    while waiting() < OUTSTANDING:
        time.sleep(0.1)
    time.sleep(5)  # the first look at each
    raw.config_resetstat()
    time.sleep(QUIET_S)
    trips, looked_at = _calls(raw, "evalsha") / QUIET_S, _calls(raw, "hmget") / QUIET_S
    channels = raw.pubsub_channels("blipq:ended:*")
    subscriptions = sum(int(count) for _, count in raw.pubsub_numsub(*channels))
    print(f"{name}: {OUTSTANDING:,} jobs outstanding, {subscriptions} subscription,")
    print(f"  {trips:.1f} round trips/s that look at {looked_at:.0f} jobs while nothing ends,")
    print(f"  {_memory() - before:.0f} MiB more")
    raw.config_resetstat()


def _report_end(raw: "redis.Redis") -> None:
    looks = _calls(raw, "evalsha") - 2 * OUTSTANDING
    print(f"  {looks / OUTSTANDING:.3f} looks per job while all of them end")


def finish_all(settings: Settings, ids: list[str]) -> None:
    """Ends jobs as a worker would."""
    with connect(settings) as raw:
        ledger = WorkerLedger(raw, settings)
        for id in ids:
            claim = ledger.claim(id, "benchmark")
            assert isinstance(claim, Claim)
            ledger.succeed(claim, RESULT, "{}")


def _calls(raw: "redis.Redis", command: str) -> int:
    """How often a command ran since the statistics were reset, in scripts or alone."""
    return int(raw.info("commandstats").get(f"cmdstat_{command}", {}).get("calls", 0))


def _memory() -> float:
    """The most memory this process has had, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def idle() -> None:
    """Prints what one job at a time takes."""
    with tempfile.TemporaryDirectory() as folder:
        stack = LocalStack(Path(folder))
        stack.start()
        environment = {**stack.environment(), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(ROOT / "tests/guarantees/stand_ins/faulty_worker.py")]
        worker = Service("worker", command, env=environment, log=Path(folder) / "worker.log")
        worker.start()
        try:
            with Client(stack.settings()) as client:
                image = client.storage.upload(red_square()).uri
                while not OperatorLedger.beside(client.ledger).workers():
                    time.sleep(0.1)
                took = sorted(_one(client, image) for _ in range(300))
        finally:
            worker.stop()
            stack.stop()
    p50, p99 = took[len(took) // 2], took[len(took) * 99 // 100]
    print(f"from call to result, idle: p50 {p50:.1f} ms, p99 {p99:.1f} ms")


def _one(client: Client, image: str) -> float:
    time.sleep(0.02)
    started = time.perf_counter()
    client.caption(image).result(timeout=30)
    return 1000 * (time.perf_counter() - started)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["submit", "wait", "idle"])
    print(f"{os.cpu_count()} CPUs, {platform.machine()}, Python {platform.python_version()},")
    print(f"load {os.getloadavg()[0]:.1f}")
    {"submit": submit, "wait": wait, "idle": idle}[parser.parse_args().what]()
