"""``blipq bench``."""

import importlib.util
import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from blipq.cli.terminal.output import reported
from blipq.errors import BlipqError

NEEDED = ("torch", "transformers", "PIL")


class Asked(StrEnum):
    """What jobs ask in a benchmark."""

    DEFAULT = "default"
    GREEDY = "greedy-20"
    MIXED = "greedy-5-50"
    TEN = "ten-questions"


_WORKLOADS = f"Only this; may be repeated: {', '.join(Asked)}."


def bench(
    model: Annotated[
        str, typer.Option(metavar="WHAT", help="Model to serve, as in BLIPQ_MODELS.")
    ] = "demo",
    images: Annotated[
        Path | None,
        typer.Option(exists=True, file_okay=False, help="Folder of photos; drawn ones by default."),
    ] = None,
    jobs: Annotated[int, typer.Option(min=32, help="Jobs of each measurement.")] = 256,
    processes: Annotated[
        int, typer.Option(min=1, help="Workers, and bare engines, that share the cores.")
    ] = 1,
    workload: Annotated[list[Asked] | None, typer.Option(metavar="NAME", help=_WORKLOADS)] = None,
    latency: Annotated[
        bool, typer.Option("--latency", help="Also at 30, 60 and 90 % load.")
    ] = False,
    json: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Where the figures are written.")
    ] = None,
) -> None:
    """Compare the whole service with the bare engine, on your model and machine.

    It starts servers and a worker of its own, with the worker's settings of this environment
    (BLIPQ_DTYPE, BLIPQ_MAX_BATCH_SIZE, ...), and stops them at the end. Leave the machine alone
    meanwhile.

    Examples:
        blipq bench
        blipq bench --model opt-2.7b --images photos --json bench.json
        blipq bench --workload greedy-5-50 --latency
        blipq bench --processes 4
    """
    arguments = ["--model", model, "--jobs", str(jobs)]
    arguments += ["--processes", str(processes)]
    arguments += ["--images", str(images)] if images else []
    arguments += ["--latency"] if latency else []
    arguments += ["--json", str(json)] if json else []
    for each in workload or []:
        arguments += ["--workload", each]
    with reported():
        if not all(map(importlib.util.find_spec, NEEDED)):
            raise BlipqError("a part is missing: pip install 'blipq[worker,local]'")
        os.execv(sys.executable, [sys.executable, "-m", "blipq_worker.bench", *arguments])
