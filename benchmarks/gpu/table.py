"""Figures of a run as a table: beside those of earlier ones.

``python -m benchmarks.gpu.table`` writes it into ``docs/gpu.md``.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tools.docs.page import replace_section

PAGE = Path(__file__).parents[2] / "docs" / "gpu.md"
RESULTS = Path(__file__).parents[1] / "results" / "gpu"
#: The first run there ever was, the last one before decoding in static slots, and the last one.
RUNS = ("first", "before", "last")

Found = Mapping[str, Any]
Row = tuple[str, Callable[[Found], str]]


def text(runs: Sequence[Found]) -> str:
    """A table in Markdown with a column for each run, and what failed in the last one."""
    heads = [f"{run['card']}, {run['date']}, {run['commit']}" for run in runs]
    lines = [["", *heads], ["---"] * (len(runs) + 1)]
    for label, cell in ROWS:
        cells = [_cell(cell, run["sections"]) for run in runs]
        if any(cells):
            lines.append([label, *cells])
    table = [f"| {' | '.join(line)} |" for line in lines]
    failed = [
        f"- {name}: {section['failed']}"
        for name, section in runs[-1]["sections"].items()
        if "failed" in section
    ]
    if failed:
        table += ["", "Not measured in the last run, since it failed:", "", *failed]
    return "\n".join(table)


def page() -> str:
    """The table of the kept runs, and how the last one was made."""
    kept = [RESULTS / f"{name}.json" for name in RUNS]
    runs = [json.loads(path.read_text()) for path in kept if path.exists()]
    last, versions = runs[-1], runs[-1]["versions"]
    made = (
        f"The last run: `make gpu` at {last['commit']}, {last['seconds']} s on one {last['card']} "
        f"with {last['cores']} cores; Python {versions['python']}, torch {versions['torch']}, "
        f"transformers {versions['transformers']}."
    )
    return f"{text(runs)}\n\n{made}"


def _cell(cell: Callable[[Found], str], sections: Found) -> str:
    """Empty where the run has no such figure."""
    try:
        return cell(sections)
    except (KeyError, TypeError):
        return ""


def _value(section: str, *path: str, form: str = ".0f") -> Callable[[Found], str]:
    """A figure of a section; a text in place of a number stands as it is."""

    def cell(sections: Found) -> str:
        value = sections[section]["found"]
        for key in path:
            value = value[key]
        return value if isinstance(value, str) else format(value, form)

    return cell


def _by_size(section: str, key: str, form: str = ".1f") -> Callable[[Found], str]:
    """A figure for each batch size, all in one cell."""

    def cell(sections: Found) -> str:
        found = sections[section]["found"]
        values = (each[key] for each in found.values())
        return " / ".join(v if isinstance(v, str) else format(v, form) for v in values)

    return cell


def _service(case: str) -> Iterator[Row]:
    name = f"service, {case}"
    yield f"**the whole service**, {case}: greedy, captions/s", _value(f"{name}: greedy", "per_s")
    yield f"{case}: a default job (5 beams), captions/s", _value(f"{name}: default", "per_s")
    yield f"{case}: photos of 12 MP, captions/s", _value(f"{name}: 12 MP", "per_s")
    alone = _value(f"{name}: one job alone", "p50_ms")
    yield f"{case}: one job alone, ms from submit to result", alone
    cpu = _value(f"{name}: greedy", "cpu_ms_a_job", "worker", form=".1f")
    yield f"{case}: a worker's CPU a job, ms", cpu
    yield f"{case}: fronts of the worker", _value(f"{name}: start", "fronts")
    yield f"{case}: from start to the first answer, s", _value(f"{name}: start", "first_answer_s")


ENGINE = (
    "greedy, 32 slots",
    "greedy, 128 slots",
    "greedy, 128 slots, beside two Python threads",
    "5 beams, 128 slots",
    "flan-t5-xl, greedy, 128 slots",
)
BATCHES = "1 / 8 / 32 / 128"
SIZES = {"opt-2.7b": BATCHES, "opt-2.7b, 512": "512", "flan-t5-xl": BATCHES}
SIZES |= {"opt-2.7b, nf4": "1 / 32 / 128", "opt-2.7b, int8": "1 / 32 / 128"}


def _rows() -> Iterator[Row]:
    yield from _service("as it comes")
    yield from _service("128 slots")
    yield "S3's stand-ins alone, pictures/s", _value("S3's stand-ins alone", "per_s")
    yield "the client and Redis alone, jobs/s", _value("the client alone", "per_s")
    for name in ENGINE:
        yield f"**the engine alone**, {name}: captions/s", _value(f"engine: {name}", "per_s")
    plain = "plain `generate`, captions/s by batch"
    yield f"{plain} ({BATCHES}): greedy", _by_size("plain generate: greedy", "per_s")
    yield f"{plain} (1 / 8 / 32): 5 beams", _by_size("plain generate: 5 beams", "per_s")
    for name, sizes in SIZES.items():
        yield f"a step of {name}, ms by sequences ({sizes})", _by_size(f"steps: {name}", "ms")
        share = _by_size(f"steps: {name}", "share", ".2f")
        yield f"its share of the roofline, {name}", share
    kernels = _value("a step of 32", "kernels"), _value("a step of 32", "busy_ms", form=".1f")
    yield "a step of 32: kernels / ms that the card is busy", _both(*kernels)
    yield "a step of 32: waits of the host for the card", _value("a step of 32", "syncs")
    images = "1 / 4 / 16 / 64 / 128"
    yield f"a look (tower, Q-Former, projection), ms by images ({images})", _by_size("looks", "ms")
    yield "its share of the roofline, looks", _by_size("looks", "share", ".2f")
    yield from _answers()
    for how in ("16 bits", "nf4", "int8"):
        name = f"memory: {how}"
        counted, peak = (
            _value(name, "counted_gib", form=".1f"),
            _value(name, "peak_gib", form=".1f"),
        )
        yield f"memory, {how}: counted / peak, GiB", _both(counted, peak)
    yield "peak: reads, GB/s", _value("peaks", "gb_per_s")
    yield "peak: 16 bits, TFLOP/s", _value("peaks", "tflops")
    yield "a kernel's launch, us", _value("peaks", "us_a_launch", form=".1f")


def _answers() -> Iterator[Row]:
    for kind in ("greedy", "sampled", "penalties", "beams"):
        equal = _value("answers: fp32 against a CPU", kind, "equal")
        yield f"texts in fp32 as on a CPU, of 16: {kind}", equal
    default = "answers: default precision"
    yield "captions in the default precision as in fp32, of 16", _value(default, "captions_equal")
    yield "the same of T5", _value(default, "t5_captions_equal")
    largest = _value(default, "itm_max_difference", form=".1g")
    yield "matching scores, default against fp32: largest difference", largest
    for how in ("int8", "nf4"):
        yield f"the canary, {how}", _passed(f"answers: {how}")
    yield "matching at full size: pairs/s", _value("matching", "auto", "pairs_per_s")
    yield "after a dead context, a call raises", _first_word("a dead context")


def _both(one: Callable[[Found], str], other: Callable[[Found], str]) -> Callable[[Found], str]:
    return lambda sections: f"{one(sections)} / {other(sections)}"


def _passed(section: str) -> Callable[[Found], str]:
    return lambda sections: "right" if sections[section]["found"]["captions"] else "wrong"


def _first_word(section: str) -> Callable[[Found], str]:
    return lambda sections: str(sections[section]["found"]["said"][-1]).split(" ")[0]


ROWS = tuple(_rows())


if __name__ == "__main__":
    replace_section(PAGE, "gpu", page())
