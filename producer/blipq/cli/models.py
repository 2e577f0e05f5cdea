"""``blipq models``: what can be served, and what it takes.

The worker's package knows; it runs in this process' place, so that nothing of it is imported here.
"""

import os
import sys
from typing import Annotated

import typer

from blipq.cli.terminal.group import Group
from blipq.cli.terminal.output import JsonOption

app = Group("Models that can be served.")


@app.command("list")
def list_(as_json: JsonOption = False) -> None:
    """List the known models, and whether their weights are on this machine.

    Examples:
        blipq models list
    """
    _become("memory", "list", *_json(as_json))


@app.command("memory")
def memory(
    model: Annotated[str, typer.Argument(help="A known model, or generation[+retrieval].")],
    batch_size: Annotated[int, typer.Option(min=1, help="Jobs in one batch.")] = 16,
    quantization: Annotated[str, typer.Option(help="auto, none, int8 or nf4.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float16, bfloat16 or float32.")] = "auto",
    beams: Annotated[int, typer.Option(min=1, help="Beams per prompt.")] = 5,
    prompt_tokens: Annotated[int, typer.Option(min=0, help="Longest prompt.")] = 32,
    new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 30,
    slots: Annotated[int, typer.Option(min=0, help="BLIPQ_DECODE_SLOTS.")] = 32,
    feature_cache: Annotated[
        int, typer.Option(min=0, help="Bytes of host memory for features of images.")
    ] = 0,
    quantize_vision: Annotated[
        bool, typer.Option("--quantize-vision", help="Quantize the vision tower, too.")
    ] = False,
    device: Annotated[str, typer.Option(help="cuda or cpu.")] = "cuda",
    as_json: JsonOption = False,
) -> None:
    """Count the memory that a model takes on a GPU or a CPU, without loading it.

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
        "--slots": slots,
        "--feature-cache": feature_cache,
        "--device": device,
    }
    flat = [str(part) for pair in options.items() for part in pair]
    flags = ["--quantize-vision"] if quantize_vision else []
    _become("memory", "memory", model, *flat, *flags, *_json(as_json))


@app.command("record-golden")
def record_golden(
    model: Annotated[str, typer.Argument(help="As in BLIPQ_MODELS: a known model, or folders.")],
    output: Annotated[str, typer.Option(help="File to write to, or to add to.")] = "goldens.json",
    quantization: Annotated[str, typer.Option(help="none, int8, nf4 or auto.")] = "none",
    dtype: Annotated[str, typer.Option(help="auto, float16, bfloat16 or float32.")] = "auto",
) -> None:
    """Record what a model says at its check, for workers to be held against (BLIPQ_GOLDENS).

    Do it where the model is known to be well: quantized and damaged copies are measured by it.

    Examples:
        blipq models record-golden opt-2.7b --output goldens.json
    """
    options = ("--output", output, "--quantization", quantization, "--dtype", dtype)
    _become("record_golden", model, *options)


def _json(as_json: bool) -> list[str]:
    return ["--json"] if as_json else []


def _become(module: str, *arguments: str) -> None:
    """Runs a command of the worker's package in this process' place. Does not return."""
    command = [sys.executable, "-m", f"blipq_worker.serving.{module}", *arguments]
    os.execv(command[0], command)
