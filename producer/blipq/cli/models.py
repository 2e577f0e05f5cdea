"""``blipq models``: what can be served, and what it takes.

The worker's package knows; it runs in this process' place, so that nothing of it is imported here.
"""

import os
import sys
from typing import Annotated

import typer

from blipq.cli.group import Group
from blipq.cli.output import JsonOption

app = Group("Models that can be served.")


@app.command("list")
def list_(as_json: JsonOption = False) -> None:
    """List the known models, and whether their weights are on this machine.

    Examples:
        blipq models list
    """
    _become("list", as_json=as_json)


@app.command("memory")
def memory(
    model: Annotated[str, typer.Argument(help="A known model, or generation[+retrieval].")],
    batch_size: Annotated[int, typer.Option(min=1, help="Jobs in one batch.")] = 16,
    quantization: Annotated[str, typer.Option(help="auto, none, int8 or nf4.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float16, bfloat16 or float32.")] = "auto",
    beams: Annotated[int, typer.Option(min=1, help="Beams per prompt.")] = 5,
    prompt_tokens: Annotated[int, typer.Option(min=0, help="Longest prompt.")] = 32,
    new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 30,
    as_json: JsonOption = False,
) -> None:
    """Count the GPU memory that a model takes, without loading it.

    Examples:
        blipq models memory opt-2.7b --quantization nf4 --batch-size 16
    """
    options = {
        "--batch-size": batch_size,
        "--quantization": quantization,
        "--dtype": dtype,
        "--beams": beams,
        "--prompt-tokens": prompt_tokens,
        "--new-tokens": new_tokens,
    }
    flat = [str(part) for pair in options.items() for part in pair]
    _become("memory", model, *flat, as_json=as_json)


def _become(*arguments: str, as_json: bool) -> None:
    """Runs the worker's command in this process' place. Does not return."""
    flags = ["--json"] if as_json else []
    command = [sys.executable, "-m", "blipq_worker.memory", *arguments, *flags]
    os.execv(command[0], command)
