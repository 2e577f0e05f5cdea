"""Writes the tables and plots of ``docs/performance.md`` from the kept figures."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tools.docs.page import replace_section

from benchmarks import cost, forms, host, results, split
from benchmarks.fleet import tables as fleet
from benchmarks.latency import POLICIES
from benchmarks.peers.run import PEERS
from benchmarks.profiling import PARTS
from benchmarks.roofline import RUNS
from benchmarks.throughput import ROWS, SEEN
from blipq_worker.bench.workloads import MIXED, Workload

DOCS = Path(__file__).parents[1] / "docs"
PAGE = DOCS / "performance.md"
#: Where a section stands that is not on that page.
ELSEWHERE = {"host": DOCS / "gpu.md", "split": DOCS / "gpu.md"}

Found = Mapping[str, Any]


def write() -> None:
    """Replaces each section whose figures are there."""
    for name, text in SECTIONS.items():
        kept = results.load(name)
        if kept is not None:
            page = ELSEWHERE.get(name, PAGE)
            replace_section(page, name, "\n".join([*text(kept["found"]), "", results.source(name)]))
    kept = results.load("fleet")
    if kept is not None:
        tenants = table(*fleet.tenants(kept["found"]))
        replace_section(
            DOCS / "operating.md", "tenants", "\n".join([*tenants, "", results.source("fleet")])
        )


def table(head: list[str], lines: list[list[str]]) -> list[str]:
    """A table in Markdown."""
    rows = [head, ["---"] * len(head), *lines]
    return [f"| {' | '.join(row)} |" for row in rows]


def _bare(found: Found) -> Iterator[str]:
    lines = []
    for model, parts in found.items():
        for row in ROWS:
            if row.name not in parts["bare"]:
                continue
            bare, service = parts["bare"][row.name], parts["service"][row.name]
            rates = bare["images_per_s"], service["images_per_s"]
            told = f"{rates[0]:.1f} ({bare['loop']})", f"{rates[1]:.1f}"
            one = parts.get("one worker", {}).get(row.name)
            told += f"**{rates[1] / rates[0]:.2f}**", f"{one['images_per_s']:.1f}" if one else ""
            lines.append([model, row.about, *told])
    head = ["model", "asked", "bare engine", "service", "efficiency", "one worker, all cores"]
    yield from table(head, lines)
    yield "\nMilliseconds of CPU an image: the bare engine with reading and decoding; the service's"
    yield "model, the worker's other threads (fetch, decode, queue), the servers, the client.\n"
    yield from table(CPU_HEAD, list(_cpu(found)))


CPU_PARTS = ("model", "others", "redis", "s3", "client")
CPU_HEAD = ["model", "asked", "bare engine", "the model", *CPU_PARTS[1:]]
CPU_HEAD += ["bare engine / all", "cores busy, bare", "cores busy"]


def _cpu(found: Found) -> Iterator[list[str]]:
    for model, parts in found.items():
        for row in ROWS:
            if "cpu_ms" not in parts["bare"].get(row.name, {}):
                continue
            bare, service = (parts[each][row.name] for each in ("bare", "service"))
            times = [bare["cpu_ms"]]
            times += [service["cpu_ms"][each] for each in CPU_PARTS]
            share = bare["cpu_ms"] / sum(times[1:])
            busy = bare["cpu_ms"] * bare["images_per_s"] / 1000, service["cores_busy"]
            told = [f"{each:.1f}" for each in times]
            yield [model, row.about, *told, *(f"{each:.2f}" for each in (share, *busy))]


def _profile(found: Found) -> Iterator[str]:
    lines = [
        [part, *(f"{shares[part]:.0%}" if part in shares else "" for shares in found.values())]
        for part in PARTS
    ]
    total = [f"**{sum(shares.values()):.0%}**" for shares in found.values()]
    yield from table(["share of the time", *found], [*lines, ["all", *total]])


def _peers(found: Found) -> Iterator[str]:
    names = [*PEERS.values(), "blipq, fp32", "blipq, its default"]
    keys = [*PEERS, "blipq float32", "blipq auto"]
    lines = []
    for row in _asked(found):
        rates = _rates(found, row)
        told = [f"{rates[key]:.2f}" if key in rates else "" for key in keys]
        lines.append([row.about, *told])
    yield from table(["images a second", *names], lines)
    yield ""
    head = ["blipq against", "best peer", "usual script", "in its default precision: best peer"]
    yield from table(head, list(_ratios(found)))
    _plot("peers", found, dict(zip(keys, names, strict=True)))
    yield "\n![Images a second, by peer](performance-peers.svg)"


def _ratios(found: Found) -> Iterator[list[str]]:
    """A peer looks again at an image that it has seen: its figures for new ones hold."""
    for row in _asked(found):
        peers = _rates(found, MIXED if row is SEEN else row)
        best = max(peers[name] for name in PEERS if name != "batches_loop")
        fp32, default = (_rates(found, row)[f"blipq {each}"] for each in ("float32", "auto"))
        ratios = fp32 / best, fp32 / peers["usual_script"], default / best
        yield [row.about, *(f"**{each:.2f}**" for each in ratios)]


def _asked(found: Found) -> list[Workload]:
    return [row for row in ROWS if row.name in found]


def _rates(found: Found, row: Workload) -> dict[str, float]:
    return {key: each["images_per_s"] for key, each in found[row.name].items()}


def _latency(found: Found) -> Iterator[str]:
    lines = []
    for images, parts in found.items():
        for load, joining in parts["joining"].items():
            policies = [parts[name][load] for name in POLICIES]
            p50, p99, busy = (
                [f"{each[key]:.2f}" for each in policies]
                for key in ("p50_s", "p99_s", "cores_busy")
            )
            gains = [f"**{each['p50_s'] / joining['p50_s']:.2f}**" for each in policies[1:]]
            told = (" / ".join(each) for each in (p50, p99, busy, gains))
            lines.append([images, f"{load}, {joining['per_s']:.1f}/s", str(joining["jobs"]), *told])
    head = ["images", "load", "jobs", "p50", "p99", "cores busy", "p50 gain"]
    yield from table(head, lines)


def _overhead(found: Found) -> Iterator[str]:
    names = {
        "noop": "a no-op Celery task",
        "recorded": "a Celery task that only claims a job and records its outcome",
        "blipq": "a blipq job, no model, no S3",
    }
    names["blipq with S3"] = "a blipq job, no model, a 100 KB JPEG read and decoded"
    lines = [
        [text, *(f"{found[key][each]:.2f}" for each in ("per_s", "cpu_ms", "redis_cpu_ms"))]
        for key, text in names.items()
    ]
    yield from table(["", "a second, one worker", "worker's CPU ms", "Redis' CPU ms"], lines)
    idle = found["idle"]
    yield f"\nblipq runs at **{found['ratio']:.2f}** of the no-op task. From submit to result on an"
    yield f"idle worker: p50 {idle['p50_ms']:.1f} ms, p99 {idle['p99_ms']:.1f} ms."
    yield f"The ledger adds {found['ledger_cpu_ms']:.2f} ms of a worker's CPU to a no-op task."


def _cost(found: Found) -> Iterator[str]:
    yield "\nThe same beside an earlier commit, whose checkout `--against` names, measured in turn:"
    rounds, jobs = found["rounds"], found["jobs"]
    yield f"medians of {rounds} rounds of {jobs:,} jobs. The model answers at once and knows every"
    yield "image.\n"
    yield from table(["", "before", "now", "ratio"], cost.rows(found))


def _against(found: Found) -> Iterator[str]:
    yield f"\nThe engine by itself beside that of {found['commit']}, mid-size model, jobs of each"
    yield f"kind in turns of both, {found['rounds']} rounds:\n"
    lines = [
        [kind, f"**{each['time']:.3f}**", f"{each['from']:.3f} to {each['to']:.3f}"]
        for kind, each in found["kinds"].items()
    ]
    yield from table(["", "time now by time before", "95 % interval of the median"], lines)


def _queued(found: Found) -> Iterator[str]:
    rates = f"{found['one_by_one_per_s']:,.0f}", f"{found['many_per_s']:,.0f}"
    grown = (f"{found['grown_mb'][name]:.0f} MB" for name in ("client", "worker"))
    size = f"{found['bytes_per_job']:,.0f}"
    head = ["jobs queued", "`submit`, a second", "`submit_many`, a second", "ratio"]
    head += ["Redis' bytes a job", "client grown by", "worker grown by"]
    line = [f"{found['jobs']:,}", *rates, f"**{found['ratio']:.1f}**", size, *grown]
    yield from table(head, [line])


def _scale(found: Found) -> Iterator[str]:
    lines = []
    for name, by_workers in found["sleeping"].items():
        one = by_workers["1"]["per_s"]
        for workers, each in by_workers.items():
            linear = each["per_s"] / (one * int(workers))
            rate, cores = f"{each['per_s']:.0f}", f"{each['cores_busy']:.2f}"
            lines.append([name, workers, rate, f"{linear:.2f}", cores])
    yield from table(["a model that sleeps", "workers", "jobs/s", "of linear", "cores busy"], lines)
    yield ""
    lines = [
        [workers, f"{each['per_s']:.1f}", f"{each['hit_rate']:.0%}"]
        for workers, each in found["repeated"].items()
    ]
    yield from table(["workers, each image four times", "jobs/s", "cache hits"], lines)


def _engine(found: Found) -> Iterator[str]:
    lines = [
        [name, f"{each['together_s']:.2f}", f"{each['apart_s']:.2f}", f"**{each['ratio']:.2f}**"]
        for name, each in found.items()
    ]
    yield from table(["", "together, s", "a call each, s", "ratio"], lines)


def _packing(found: Found) -> Iterator[str]:
    lines = [
        [
            name,
            *(f"{1000 * each[key]:.1f}" for key in ("packed_s", "plain_s")),
            f"**{each['ratio']:.2f}**",
        ]
        for name, each in found.items()
    ]
    yield from table(["ms an image", "packed", "as PyTorch runs it", "ratio"], lines)


def _steps(found: Found) -> Iterator[str]:
    lines = [
        [rows, f"{each['own_ms']:.1f}", f"{each['decoder_ms']:.1f}", f"**{each['ratio']:.2f}**"]
        for rows, each in found.items()
    ]
    yield from table(["rows in a step", "layers alone, ms", "transformers' decoder, ms", ""], lines)


def _times(found: Found) -> list[str]:
    return [f"{found[key]:.1f}" for key in ("ms", "per_s", "least_ms")]


def _roofline(found: Found) -> Iterator[str]:
    lines = [
        [name, part, batch, *_times(each), f"**{each['share']:.2f}**"]
        for name, parts in found.items()
        for part in RUNS
        for batch, each in parts[part].items()
    ]
    head = ["model", "a pass over", "batch", "ms", "a second", "roofline, ms", "share of it"]
    yield from table(head, lines)
    yield ""
    for name, parts in found.items():
        reads, computes = f"{parts['gb_per_s']:.0f} GB/s", f"{parts['tflops']:.2f} TFLOP/s"
        yield f"Measured peaks, {name}: {reads} read, {computes}."


def _host(found: Found) -> Iterator[str]:
    yield from table(host.HEAD, host.rows(found))


def _split(found: Found) -> Iterator[str]:
    yield from table(split.HEAD, split.rows(found))


def _fleet(found: Found) -> Iterator[str]:
    for each in fleet.text(found):
        yield from (*table(*each), "")


def _forms(found: Found) -> Iterator[str]:
    yield from table(forms.HEAD, forms.rows(found))
    yield ""
    yield from table(forms.MEMORY_HEAD, forms.memory_rows(found))


SECTIONS: dict[str, Callable[[Found], Iterator[str]]] = {
    "bare": _bare,
    "profile": _profile,
    "peers": _peers,
    "latency": _latency,
    "overhead": _overhead,
    "cost": _cost,
    "against": _against,
    "queued": _queued,
    "scale": _scale,
    "engine": _engine,
    "packing": _packing,
    "steps": _steps,
    "roofline": _roofline,
    "host": _host,
    "split": _split,
    "forms": _forms,
    "fleet": _fleet,
}


def _plot(name: str, found: Found, names: Mapping[str, str]) -> None:
    """Bars by row, one for each system, as SVG."""
    bar, gap, left, width = 14, 24, 230, 760
    parts, y = [], 10
    for row in _asked(found):
        rates = _rates(found, row)
        parts.append(f'<text x="10" y="{y + 12}" font-weight="bold">{row.about}</text>')
        y += 20
        top = max(rates.values(), default=1)
        for key, rate in rates.items():
            color = "#c2410c" if key.startswith("blipq") else "#94a3b8"
            long = (width - left - 60) * rate / top
            parts.append(
                f'<text x="{left - 8}" y="{y + 11}" text-anchor="end">{names[key]}</text>'
                f'<rect x="{left}" y="{y}" width="{long:.0f}" height="{bar - 2}" fill="{color}"/>'
                f'<text x="{left + long + 5:.0f}" y="{y + 11}">{rate:.2f}</text>'
            )
            y += bar
        y += gap
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{y}"'
    style = 'font-family="sans-serif" font-size="11" fill="#334155"'
    background = f'<rect width="{width}" height="{y}" fill="#ffffff"/>'
    text = "\n".join([f"{head} {style}>", background, *parts, "</svg>\n"])
    (DOCS / f"performance-{name}.svg").write_text(text)
