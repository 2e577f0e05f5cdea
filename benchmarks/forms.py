"""One process or several: ``python -m benchmarks forms`` has a worker's forms beside each other.

All are up at once, each with a model name of its own, and take turns with the same pictures, so
that other work on the machine takes from all of them alike. Another one is first each time.
BENCH_BEFORE may name the Python of another checkout, whose worker is then the first of the forms.
"""

import os
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import psutil

from benchmarks.photos import pictures
from benchmarks.processes import of_worker
from benchmarks.throughput import PROCESSES, environment
from blipq import CaptionRequest
from blipq.contract import Generation, ImageRef, Options
from blipq.local.supervisor import Service
from blipq_worker.bench.pictures import Pictures
from blipq_worker.bench.stack import Stack, running
from blipq_worker.bench.workloads import GREEDY, MIXED, TEN, Workload

ROWS = (GREEDY, MIXED, TEN)
#: Jobs that a form holds in all of its workers, and those of a backlog.
HELD, JOBS = 32, 64
#: Jobs by which the wait of one alone is known, and those before them.
ALONE, WARM = 100, 20
SHORT = Generation(num_beams=1, max_new_tokens=5)


@dataclass(frozen=True)
class Form:
    """A worker a core, each with so many fronts. model: the name that its jobs ask for."""

    about: str
    model: str
    fronts: int | None = 0
    workers: int = PROCESSES
    python: str = sys.executable

    def environment(self, served: Mapping[str, str]) -> dict[str, str]:
        """The settings of its workers, which share the jobs held."""
        more = {} if self.fronts is None else {"BLIPQ_FRONTS": str(self.fronts)}
        model = served["BLIPQ_MODELS"].replace("default=", f"{self.model}=")
        held = {"BLIPQ_CONCURRENCY": str(HELD // self.workers)}
        return {**served, **held, **more, "BLIPQ_MODELS": model}


FORMS = (
    Form("all in one process", "one"),
    Form("an engine and a front", "front", 1),
    Form("an engine and two fronts", "fronts", 2),
)


def all_forms() -> list[Form]:
    """The forms, after the one of the other checkout if there is one."""
    python = os.environ.get("BENCH_BEFORE")
    before = [Form("before, all in one process", "before", None, python=python)] if python else []
    return [*before, *FORMS]


class Beside:
    """The workers of several forms, all up."""

    def __init__(self, stack: Stack, forms: Sequence[Form], served: Mapping[str, str]) -> None:
        self.stack = stack
        self.forms = forms
        self._workers: dict[str, list[Service]] = {}
        for form in forms:
            before = len(stack.workers)
            program = [form.python, "-m", "blipq_worker"]
            stack.start_workers(form.environment(served), program, processes=form.workers)
            self._workers[form.model] = stack.workers[before:]

    def warm_up(self, source: Pictures) -> None:
        """Some jobs for each, which are not counted."""
        images = self.stack.upload(source.take(16))
        for form in self.forms:
            self.stack.backlog(list(GREEDY.requests(images)), form.model)

    def turned(self, by: int) -> list[Form]:
        """The forms in turn, beginning with another one."""
        by %= len(self.forms)
        return [*self.forms[by:], *self.forms[:by]]

    def processes(self, form: Form) -> list[tuple[str, psutil.Process]]:
        """The processes of its workers by what they are."""
        workers = (of_worker(each.pid) for each in self._workers[form.model])
        return [(name, each) for found in workers for name in found for each in found[name]]

    def cpu_s(self, form: Form) -> dict[str, float]:
        """CPU seconds until now by what spent them."""
        spent: dict[str, float] = {}
        for name, process in self.processes(form):
            with suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                spent[name] = spent.get(name, 0.0) + times.user + times.system
        return spent

    def memory(self, form: Form) -> dict[str, dict[str, float]]:
        """The largest of each kind of process: resident MiB, and those that are its alone."""
        found: dict[str, dict[str, float]] = {}
        for name, process in self.processes(form):
            with suppress(psutil.NoSuchProcess):
                each = process.memory_full_info()
                now = {"rss_mib": each.rss / 2**20, "own_mib": each.uss / 2**20}
                if name not in found or now["rss_mib"] > found[name]["rss_mib"]:
                    found[name] = now
        return found


def forms(rounds: int) -> dict[str, Any]:
    """By form: images a second and CPU by workload, memory by process, the wait of a job alone."""
    source = pictures(8)
    with running() as stack:
        beside = Beside(stack, all_forms(), environment())
        beside.warm_up(source)
        runs = [_round(beside, row, source, turn) for turn in range(rounds) for row in ROWS]
        memory = {form.model: beside.memory(form) for form in beside.forms}
        alone = _alone(beside, beside.stack.upload(source.take(1))[0])
    return {
        form.model: {
            "about": form.about,
            "rows": _rows_of([run[form.model] for run in runs]),
            "memory": memory[form.model],
            "alone": alone[form.model],
        }
        for form in all_forms()
    }


def _round(beside: Beside, row: Workload, source: Pictures, turn: int) -> dict[str, Any]:
    """The same backlog for each form: every picture is new to its workers."""
    count = row.images(JOBS)
    requests = list(row.requests(beside.stack.upload(source.take(count)), seed=1 + turn))
    found = {}
    for form in beside.turned(turn):
        before = beside.cpu_s(form)
        through = beside.stack.backlog(requests, form.model)
        spent = beside.cpu_s(form)
        found[form.model] = {
            "row": row.name,
            "per_s": through.per_s,
            "cpu_ms": {name: 1000 * (spent[name] - before[name]) / count for name in before},
        }
    first = beside.forms[0].model
    for each in found.values():
        each["of_first"] = each["per_s"] / found[first]["per_s"]
    return found


def _rows_of(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Medians over the rounds, by workload; of_first: as many times as many as the first form."""
    found = {}
    for row in ROWS:
        same = [each for each in runs if each["row"] == row.name]
        middle = {name: statistics.median(each[name] for each in same) for name in _RATES}
        parts = {part for each in same for part in each["cpu_ms"]}
        middle["cpu_ms"] = {
            part: statistics.median(each["cpu_ms"].get(part, 0.0) for each in same)
            for part in sorted(parts)
        }
        found[row.name] = {**middle, "of_first_by_round": [each["of_first"] for each in same]}
    return found


_RATES = ("per_s", "of_first")


def _alone(beside: Beside, image: ImageRef) -> dict[str, dict[str, float]]:
    """Milliseconds from submit to result of one job at a time; the forms take turns job by job.

    All are about one image, so that what is written is all that the model does.
    """
    waits: dict[str, list[float]] = {form.model: [] for form in beside.forms}
    for number in range(WARM + ALONE):
        request = CaptionRequest(image=image, prompt=f"number {number}", generation=SHORT)
        for form in beside.turned(number):
            started = time.monotonic()
            job = beside.stack.client.submit(request, Options(model=form.model))
            job.result(timeout=60)
            waits[form.model].append(1000 * (time.monotonic() - started))
    counted = {model: each[WARM:] for model, each in waits.items()}
    first = counted[beside.forms[0].model]
    return {
        model: {
            "p50_ms": statistics.median(each),
            "p10_ms": sorted(each)[ALONE // 10],
            "more_ms": statistics.median(a - b for a, b in zip(each, first, strict=True)),
        }
        for model, each in counted.items()
    }


HEAD = ["a worker's form", *(row.about for row in ROWS), "CPU ms of the first, by process"]
HEAD += ["one job alone, p50 / p10, ms", "paired with the first, p50, ms"]


def rows(found: Mapping[str, Any]) -> list[list[str]]:
    """A line of the table for each form."""
    return [_line(form) for form in found.values()]


def _line(form: Mapping[str, Any]) -> list[str]:
    cells = [form["about"]]
    for row in ROWS:
        each = form["rows"][row.name]
        spent = sum(each["cpu_ms"].values())
        cells.append(f"{each['per_s']:.1f} (**{each['of_first']:.2f}**), {spent:.0f} ms")
    cpu = form["rows"][GREEDY.name]["cpu_ms"]
    cells.append(", ".join(f"{name} {ms:.1f}" for name, ms in cpu.items()))
    alone = form["alone"]
    waits = f"{alone['p50_ms']:.0f} / {alone['p10_ms']:.0f}", f"{alone['more_ms']:+.0f}"
    return [*cells, *waits]


MEMORY_HEAD = ["a worker's form", "process", "resident, MiB", "its alone, MiB"]


def memory_rows(found: Mapping[str, Any]) -> list[list[str]]:
    """A line for each kind of process of each form."""
    return [
        [form["about"], name, f"{each['rss_mib']:.0f}", f"{each['own_mib']:.0f}"]
        for form in found.values()
        for name, each in form["memory"].items()
    ]
