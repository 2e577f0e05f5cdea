"""``python -m benchmarks.tracing [JOBS] [ROUNDS]``: what traces cost, where a model takes no time.

Jobs a second without tracing, with 1 % of the jobs sampled, and with all; the rounds take turns, so
that what else the machine does meets all three. The collector is a process of its own that reads
what it is sent and throws it away.
"""

import multiprocessing
import os
import statistics
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.connection import Connection
from typing import Any

from benchmarks.overhead import AT_ONCE, SLEEPING, THREADS, WARM, requests
from blipq.telemetry import tracing
from blipq_worker.bench.stack import Stack, running

SAMPLERS: Mapping[str, Mapping[str, str]] = {
    "off": {"OTEL_SDK_DISABLED": "true"},
    "1 %": {"OTEL_TRACES_SAMPLER": "parentbased_traceidratio", "OTEL_TRACES_SAMPLER_ARG": "0.01"},
    "all": {"OTEL_TRACES_SAMPLER": "parentbased_always_on"},
}


class _Sink(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        """Quiet."""


def _sink(found: Connection) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Sink)
    found.send(server.server_address[1])
    server.serve_forever()


@contextmanager
def collector() -> Iterator[str]:
    """The URL of a collector that keeps nothing."""
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_sink, args=(theirs,))
    process.start()
    try:
        yield f"http://127.0.0.1:{ours.recv()}"
    finally:
        process.kill()
        process.join()


def per_s(stack: Stack, variables: Mapping[str, str], jobs: int) -> float:
    """Jobs a second through a worker, and a client, with these variables."""
    before = dict(os.environ)
    os.environ.update(variables)
    tracing.reset()
    image = stack.upload([b"nothing"])[0]
    try:
        environment = {**AT_ONCE, "BENCH_FETCH": "0", "BLIPQ_CONCURRENCY": str(THREADS)}
        stack.start_workers({**environment, **variables}, SLEEPING)
        stack.backlog(requests(image, WARM))
        return stack.backlog(requests(image, jobs)).per_s
    finally:
        stack.stop_workers()
        os.environ.clear()
        os.environ.update(before)
        tracing.reset()


def main(jobs: int = 1_000, rounds: int = 3) -> None:
    """Measures, and prints a table."""
    found: dict[str, list[float]] = {name: [] for name in SAMPLERS}
    with collector() as url, running() as stack:
        for _ in range(rounds):
            for name, variables in SAMPLERS.items():
                variables = {"OTEL_EXPORTER_OTLP_ENDPOINT": url, **variables}
                found[name].append(per_s(stack, variables, jobs))
    off = statistics.median(found["off"])
    for name, rates in found.items():
        rate = statistics.median(rates)
        print(f"{name:>4}: {rate:7.0f} jobs/s, {rate / off:.2f} of off, {rates}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
