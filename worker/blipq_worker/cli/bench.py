"""``blipq bench``."""

import importlib.util
import os
from enum import StrEnum
from json import dumps
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from blipq.cli.terminal.output import JsonOption, errors, reported
from blipq.errors import BlipqError
from blipq.local.worker import NO_WORKER
from blipq.settings import CONNECTION_FIELDS

NEEDED = ("torch", "transformers", "PIL")


class Asked(StrEnum):
    """The request of a benchmark's jobs."""

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
    as_json: JsonOption = False,
) -> None:
    """Compare the whole service with the bare engine.

    On your model and machine. It starts servers and a worker of its own, with the worker's settings
    of this environment (BLIPQ_DTYPE, BLIPQ_MAX_BATCH_SIZE, ...), and stops them at the end. Leave
    the machine alone meanwhile.

    Examples:
        blipq bench
        blipq bench --model opt-2.7b --images photos --json > bench.json
        blipq bench --workload greedy-5-50 --latency
        blipq bench --processes 4
    """
    with reported(as_json):
        if not all(map(importlib.util.find_spec, NEEDED)):
            raise BlipqError(f"a part is missing: {NO_WORKER}")
    # Servers and worker are its own, whatever the settings say.
    for name in (*CONNECTION_FIELDS, "health_port", "allowed_buckets"):
        os.environ.pop(f"BLIPQ_{name.upper()}", None)
    from blipq_worker.bench.figures import Options, measured, table

    try:
        found = measured(Options(model, images, jobs, processes, latency, workload or ()))
    except (BlipqError, ValueError) as error:
        errors.print(f"blipq bench: {error}", markup=False)
        raise typer.Exit(1) from None
    if as_json:
        print(dumps(found))
    else:
        Console(highlight=False).print(table(found))
