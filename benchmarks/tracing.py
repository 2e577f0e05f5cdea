"""What traces cost: ``python -m benchmarks.tracing [--demo] [--jobs N] [--rounds N]``.

Jobs a second without tracing, with 1 % of the jobs sampled, and with all; the rounds take turns, so
that what else the machine does meets all three. The model takes no time, so that all is overhead,
or it is the demo model. The collector is a process of its own that reads what it is sent and throws
it away.
"""

import argparse
import io
import multiprocessing
import operator
import os
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from PIL import Image
from tools.docs.page import replace_section

from benchmarks import results
from benchmarks.overhead import AT_ONCE, SLEEPING, THREADS, WARM, requests
from blipq.telemetry import tracing
from blipq_worker.bench.stack import Stack, Through, running

PAGE = Path(__file__).parents[1] / "docs" / "tracing.md"
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


def measured(jobs: int, rounds: int, *, demo: bool) -> dict[str, Any]:
    """Medians of the rounds, and of the rounds' ratios to the one without traces."""
    found: dict[str, list[Through]] = {name: [] for name in SAMPLERS}
    with collector() as url, running() as stack:
        for number in range(rounds):
            # The other way round each time: what changes steadily meets all alike.
            for name in list(SAMPLERS)[:: -1 if number % 2 else 1]:
                variables = {"OTEL_EXPORTER_OTLP_ENDPOINT": url, **SAMPLERS[name]}
                found[name].append(through(stack, variables, jobs, demo=demo))
    rates = {name: [each.per_s for each in runs] for name, runs in found.items()}
    costs = {name: [sum(each.cpu_ms().values()) for each in runs] for name, runs in found.items()}
    return {
        "jobs": jobs,
        "rounds": rounds,
        "samplers": {
            name: {
                "per_s": statistics.median(rates[name]),
                "ratio": _ratio(rates[name], rates["off"]),
                "least": min(map(operator.truediv, rates[name], rates["off"])),
                "most": max(map(operator.truediv, rates[name], rates["off"])),
                "cpu_ms": statistics.median(costs[name]),
                "cpu_ratio": _ratio(costs[name], costs["off"]),
            }
            for name in SAMPLERS
        },
    }


def _ratio(some: Sequence[float], others: Sequence[float]) -> float:
    return statistics.median(map(operator.truediv, some, others))


def _text(found: Mapping[str, Any], model: str) -> Iterator[str]:
    yield f"| {model}, sampled | jobs/s | of none | between | CPU ms a job | of none |"
    yield "|---|---|---|---|---|---|"
    for name, each in found["samplers"].items():
        yield (
            f"| {'none' if name == 'off' else name} | {each['per_s']:.0f} | "
            f"**{each['ratio']:.2f}** | {each['least']:.2f} and {each['most']:.2f} | "
            f"{each['cpu_ms']:.2f} | {each['cpu_ratio']:.2f} |"
        )
    yield ""
    yield f"Medians of {found['rounds']} rounds of {found['jobs']:,} jobs, and of their ratios."


def main() -> None:
    """Measures, keeps the figures, and writes a section of docs/tracing.md."""
    parser = argparse.ArgumentParser("python -m benchmarks.tracing", description=__doc__)
    parser.add_argument("--demo", action="store_true", help="with the demo model")
    parser.add_argument("--jobs", type=int, default=1_000, help="of each round")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    name = "tracing-demo" if options.demo else "tracing"
    asked = f"--jobs {options.jobs} --rounds {options.rounds}{' --demo' * options.demo}"
    found = results.measure(
        name,
        lambda: measured(options.jobs, options.rounds, demo=options.demo),
        command=f"python -m benchmarks.tracing {asked}",
    )
    model = "the demo model" if options.demo else "a model that takes no time"
    lines = [*_text(found, model), "", results.source(name)]
    replace_section(PAGE, name, "\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
