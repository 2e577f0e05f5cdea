"""``blipq models``: what can be served, and what it takes."""

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from blipq.cli.terminal.group import Group
from blipq.cli.terminal.output import JsonOption, out
from blipq.submission import checked
from blipq_worker.catalog.adapters import Described, describe_all
from blipq_worker.catalog.models import KNOWN_MODELS
from blipq_worker.catalog.s3.places import is_in_s3
from blipq_worker.catalog.weights import (
    Weights,
    free_bytes,
    gigabytes,
    how_to_get,
    hub_cache,
    weights_of,
    weights_of_served,
)
from blipq_worker.cli.refusing import one_of, refused, require_torch
from blipq_worker.cli.upgrades import compare, record_golden
from blipq_worker.settings import Dtype, Quantization, WorkerSettings

if TYPE_CHECKING:
    from blipq_worker.serving.footprint import Memory

app = Group("Models that can be served.")

Device = Literal["cuda", "cpu"]

_SUMS = (
    "weights",
    "shared",
    "kv_batch",
    "kv_slots",
    "activations",
    "host_cache",
    "total",
    "heat_maps",
)


@app.command("list")
def list_(as_json: JsonOption = False) -> None:
    """List the known models, those of BLIPQ_MODELS, and whether their weights are there.

    Adapters of BLIPQ_ADAPTERS are listed, too, with what keeps them from being served.

    Examples:
        blipq models list
    """
    known = {
        name: [weights_of(each) for each in (model.generation, model.retrieval) if each]
        for name, model in KNOWN_MODELS.items()
    }
    with refused():
        others = _others()
        adapters = list(describe_all(checked(WorkerSettings).adapters))
    if as_json:
        rows = [
            {"model": name, "about": KNOWN_MODELS[name].about, "checkpoints": _described(found)}
            for name, found in known.items()
        ]
        served = [
            {"model": name, "checkpoints": _described(found)} for name, found in others.items()
        ]
        place = {"cache": str(hub_cache()), "free": free_bytes()}
        over = [asdict(each) for each in adapters]
        print(json.dumps({"models": rows, "served": served, "adapters": over, **place}))
        return
    for name, found in known.items():
        print(f"{name:23} {KNOWN_MODELS[name].about}")
        for each in found:
            out.print(f"{'':6} {_weights_line(each)}", markup=False)
    for name, found in others.items():
        out.print(f"{name:23} as BLIPQ_MODELS has it", markup=False)
        for each in found:
            out.print(f"{'':6} {_weights_line(each)}", markup=False)
    for adapter in adapters:
        out.print(f"{adapter.name:23} {_adapter_line(adapter)}", markup=False)
    print(f"{'demo':23} coloured shapes on a plain background; comes with blipq")
    print(f"\n{gigabytes(free_bytes())} free in {hub_cache()}")
    print("A worker fetches what it serves; by hand: hf download ID --exclude '*.bin'")


@app.command("memory")
def memory(
    model: Annotated[str, typer.Argument(help="A known model, or as in BLIPQ_MODELS.")],
    batch_size: Annotated[int, typer.Option(min=1, help="Jobs in one batch.")] = 16,
    quantization: Annotated[str, typer.Option(help="auto, none, int8 or nf4.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float16, bfloat16 or float32.")] = "auto",
    beams: Annotated[int, typer.Option(min=1, help="Beams per prompt.")] = 5,
    prompt_tokens: Annotated[int, typer.Option(min=0, help="Longest prompt.")] = 32,
    new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 30,
    slots: Annotated[
        int, typer.Option(min=0, help="BLIPQ_DECODE_SLOTS; GPUs with room take 128.")
    ] = 32,
    feature_cache: Annotated[
        int, typer.Option(min=0, help="Bytes of host memory for features of images.")
    ] = 0,
    quantize_vision: Annotated[
        bool, typer.Option("--quantize-vision", help="Quantize the vision tower, too.")
    ] = False,
    device: Annotated[str, typer.Option(help="cuda or cpu.")] = "cuda",
    adapter: Annotated[
        list[str] | None, typer.Option(help="A LoRA adapter's folder; may be repeated.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Count the memory that a model takes on a GPU or a CPU, without loading it.

    Examples:
        blipq models memory opt-2.7b --quantization nf4 --batch-size 16
    """
    with refused():
        known_quantization: Quantization = one_of("--quantization", quantization, Quantization)
        known_dtype: Dtype = one_of("--dtype", dtype, Dtype)
        one_of("--device", device, Device)
        require_torch("counting")
        from blipq_worker.serving.footprint import Load, memory_of
        from blipq_worker.serving.memory import for_cards, gpus, verdict, verdict_on_the_cpu

        load = Load(
            batch_size=batch_size,
            beams=beams,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            slots=slots,
            feature_cache=feature_cache,
        )

        def count(quantization: Quantization) -> "Memory":
            return memory_of(
                model,
                quantization=quantization,
                quantize_vision=quantize_vision,
                dtype=known_dtype,
                load=load,
                device=device,
                adapters=adapter or (),
            )

        cards = gpus() if device == "cuda" else []
        if known_quantization == "auto":
            counted = for_cards(count, cards)
        else:
            counted = count(known_quantization)
        fits = verdict(counted, cards) if device == "cuda" else verdict_on_the_cpu(counted)
    if as_json:
        sums = {name: getattr(counted, name) for name in _SUMS}
        print(json.dumps({**asdict(counted), **sums, "verdict": fits}))
        return
    for line in _memory_lines(counted):
        print(line)
    print(fits)


@app.command("convert")
def convert(
    file: Annotated[Path, typer.Argument(help="A checkpoint of LAVIS, such as FILE.pth.")],
    folder: Annotated[Path, typer.Argument(help="The folder to write; a new one.")],
    base: Annotated[
        str | None,
        typer.Option(help="What gives frozen weights and tokenizer: a known model, id or folder."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Write a checkpoint of LAVIS as a folder that can be served.

    Weights that LAVIS did not save, as they were frozen, are the base's. Without `--base` that is
    the published model of the same kind and size.

    Examples:
        blipq models convert checkpoint_best.pth my-captions --base opt-2.7b
    """
    with refused():
        require_torch("converting")
        from blipq_worker.conversion.convert import convert

        done = convert(file, folder, base)
    if as_json:
        print(json.dumps(asdict(done)))
        return
    for line in done.lines():
        out.print(line, markup=False)


app.command("compare")(compare)
app.command("record-golden")(record_golden)


@app.command("push")
def push(
    folder: Annotated[Path, typer.Argument(help="A checkpoint's folder, with safetensors.")],
    target: Annotated[str, typer.Argument(metavar="S3_URI", help="s3://bucket/prefix, empty.")],
) -> None:
    """Bring a checkpoint to S3, for workers to read it from there (BLIPQ_MODEL_S3_*).

    Prints the name to serve it by, with its revision. A push that was killed goes on where it is
    run again; nothing that is there is written over. A goldens.json in the folder goes with it.

    Examples:
        blipq models push ./my-model s3://models/my-model/v1
    """
    with refused():
        from blipq_worker.serving.pushing import push as push_folder

        print(push_folder(folder, target, lambda line: print(line, file=sys.stderr, flush=True)))


@app.command("weights", hidden=True)
def weights() -> None:
    """For `blipq doctor`: the weights of BLIPQ_MODELS, as JSON.

    Examples:
        blipq models weights
    """
    with refused():
        options = checked(WorkerSettings)
        found = weights_of_served(options.models)
        missing = [each for each in found if not each.present]
        described = {
            "weights": _described(found),
            "adapters": [asdict(each) for each in describe_all(options.adapters)],
            "cache": str(hub_cache()),
            "free": free_bytes(),
            "advice": how_to_get(missing) if missing else None,
        }
    print(json.dumps(described))


def _others() -> dict[str, list[Weights]]:
    """The weights of models in BLIPQ_MODELS that are no known ones."""
    models = checked(WorkerSettings).models.items()
    others = {name: what for name, what in models if what not in (*KNOWN_MODELS, "demo")}
    return {name: weights_of_served({name: what}) for name, what in others.items()}


def _weights_line(each: Weights) -> str:
    size = "unknown size" if each.bytes is None else gigabytes(each.bytes)
    if is_in_s3(each.checkpoint):
        where = each.problem or "in S3"
    else:
        where = "here" if each.present else "not here"
    return f"{each.checkpoint:36} {size:>8}  {where}"


def _adapter_line(each: Described) -> str:
    if each.problem is not None:
        return f"over {each.base}: {each.problem}"
    assert each.parameters is not None
    assert each.bytes is not None
    size = f"rank {each.rank}, {each.parameters / 1e6:.1f} M, {gigabytes(each.bytes)}"
    return f"over {each.base}: {each.folder}, {size}"


def _described(found: Sequence[Weights]) -> list[dict[str, Any]]:
    return [{**asdict(each), "command": each.command} for each in found]


def _memory_lines(memory: "Memory") -> Iterator[str]:
    from blipq_worker.serving.footprint import GIB

    load = memory.load
    yield f"{memory.model}, {memory.quantization}, on {memory.device}"
    for part in memory.parts:
        millions = f"{part.parameters / 1e6:,.1f} M"
        yield f"  {part.name:24} {part.precision:9} {millions:>11}  {part.bytes / GIB:7.2f} GiB"
    row = f"{load.batch_size} x {load.beams} beams x {memory.kv_row / 2**20:.1f} MiB"
    slot = memory.kv_token * load.slot_tokens / 2**20
    less = f"{memory.shared / GIB:.2f} less if towers are equal" if memory.shared else ""
    looks = f"vision {memory.vision / GIB:.2f}, language {memory.language / GIB:.2f}"
    for name, note, count in (
        ("weights", less, memory.weights),
        ("KV of a pass", row, memory.kv_batch),
        ("KV in flight", f"{load.slots} slots x {slot:.1f} MiB", memory.kv_slots),
        ("activations", f"estimate: {looks}", memory.activations),
        ("context", "estimate", memory.context),
        ("total", "", memory.total),
    ):
        yield f"  {name:14} {note:39}  {count / GIB:7.2f} GiB"
    if load.feature_cache:
        where = "host memory" if memory.device == "cuda" else "in the total"
        yield f"  {'feature cache':14} {where:39}  {load.feature_cache / GIB:7.2f} GiB"
    if memory.heat_maps:
        when = "beside the total, once one is drawn"
        yield f"  {'heat maps':14} {when:39}  {memory.heat_maps / GIB:7.2f} GiB"
