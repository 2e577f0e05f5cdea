"""``blipq demo``."""

import importlib.util
import secrets
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from blipq.cli.terminal.output import JsonOption, reported
from blipq.errors import BlipqError
from blipq.local.worker import NO_WORKER
from blipq_worker.demo.options import Options
from blipq_worker.demo.signals import Interrupted, Signals

NEEDED = ("torch", "transformers", "PIL", "jinja2")


class Quantization(StrEnum):
    """Precisions of the weights."""

    AUTO = "auto"
    NONE = "none"
    INT8 = "int8"
    NF4 = "nf4"


def demo(
    images: Annotated[int, typer.Option(min=1, help="How many pictures; 6 jobs each.")] = 64,
    seed: Annotated[
        int | None, typer.Option(help="The same seed draws the same pictures; random by default.")
    ] = None,
    quantization: Annotated[
        Quantization, typer.Option(help="How weights are kept; auto: nf4 where a GPU is too small.")
    ] = Quantization.AUTO,
    report: Annotated[
        Path, typer.Option(metavar="FILE", help="Where the report is written.")
    ] = Path("demo-report.html"),
    model: Annotated[
        str, typer.Option(metavar="WHAT", help="Model to serve, as in BLIPQ_MODELS.")
    ] = "demo",
    as_json: JsonOption = False,
) -> None:
    """Show it all in a minute, on pictures whose content is known.

    It starts servers and a worker of its own. Every answer is checked and the report shows each
    beside its picture. Everything runs on this machine and is stopped at the end. Exits 0 if at
    least 95 % is right and no job failed.

    Examples:
        blipq demo
        blipq demo --images 8 --seed 7 --report report.html
    """
    with reported(as_json):
        if not all(map(importlib.util.find_spec, NEEDED)):
            raise BlipqError(f"a part is missing for the demo: {NO_WORKER}")
    drawn = secrets.randbelow(1_000_000) if seed is None else seed
    raise typer.Exit(_give(Options(images, drawn, quantization, report, model, as_json)))


def _give(options: Options) -> int:
    """Gives the demo; the exit code."""
    signals = Signals()
    try:
        signals.watch()
        # Only now, because it takes a second in which Ctrl-C may come.
        from blipq_worker.demo.run import give

        return give(options, signals)
    except Interrupted as interruption:
        print("stopped", file=sys.stderr)
        return 128 + interruption.number
