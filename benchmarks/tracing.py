"""``python -m benchmarks.tracing [--demo] [--jobs N] [--rounds N]``: what traces cost.

Jobs a second without tracing, with 1 % of the jobs sampled, and with all; the rounds take turns, so
that what else the machine does meets all three. The model takes no time, so that all is overhead,
or it is the demo model. The collector is a process of its own that reads what it is sent and throws
it away.
"""

import argparse
import io
import multiprocessing
import os
import statistics
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.connection import Connection
from typing import Any

from PIL import Image

from benchmarks.overhead import AT_ONCE, SLEEPING, THREADS, WARM, requests
from blipq.telemetry import tracing
from blipq_worker.bench.stack import Stack, Through, running

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


def through(stack: Stack, variables: Mapping[str, str], jobs: int, *, demo: bool) -> Through:
    """Jobs through a worker, from a client, with these variables."""
    before = dict(os.environ)
    os.environ.update(variables)
    tracing.reset()
    image = stack.upload([_picture()])[0]
    try:
        if demo:
            stack.start_workers({"BLIPQ_MODELS": "default=demo", **variables})
        else:
            environment = {**AT_ONCE, "BENCH_FETCH": "0", "BLIPQ_CONCURRENCY": str(THREADS)}
            stack.start_workers({**environment, **variables}, SLEEPING)
        stack.backlog(requests(image, WARM))
        return stack.backlog(requests(image, jobs))
    finally:
        stack.stop_workers()
        os.environ.clear()
        os.environ.update(before)
        tracing.reset()


def _picture() -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(stream, "PNG")
    return stream.getvalue()


def main() -> None:
    """Measures, and prints a table."""
    parser = argparse.ArgumentParser("python -m benchmarks.tracing")
    parser.add_argument("--demo", action="store_true", help="with the demo model")
    parser.add_argument("--jobs", type=int, default=1_000, help="of each round")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    found: dict[str, list[Through]] = {name: [] for name in SAMPLERS}
    with collector() as url, running() as stack:
        for _ in range(options.rounds):
            for name, variables in SAMPLERS.items():
                variables = {"OTEL_EXPORTER_OTLP_ENDPOINT": url, **variables}
                found[name].append(through(stack, variables, options.jobs, demo=options.demo))
    rates = {name: statistics.median(each.per_s for each in runs) for name, runs in found.items()}
    costs = {
        name: statistics.median(sum(each.cpu_ms().values()) for each in runs)
        for name, runs in found.items()
    }
    for name, runs in found.items():
        shown = ", ".join(f"{each.per_s:.0f}" for each in runs)
        rate, cost = rates[name] / rates["off"], costs[name] / costs["off"]
        print(
            f"{name:>4}: {rates[name]:4.0f} jobs/s, {rate:.2f} of off (rounds: {shown}); "
            f"{costs[name]:.2f} CPU ms a job, {cost:.2f} of off"
        )


if __name__ == "__main__":
    main()
