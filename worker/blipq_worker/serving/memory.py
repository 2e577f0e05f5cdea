"""Which models there are, what they take of a device's memory, and what is free there.

``python -m blipq_worker.serving.memory list | memory MODEL | weights``: what ``blipq models``
and ``blipq doctor`` run.
"""

import argparse
import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, get_args

from blipq.errors import BlipqError
from blipq.submission import checked
from blipq_worker.catalog.models import KNOWN_MODELS, ModelError
from blipq_worker.catalog.weights import (
    Weights,
    free_bytes,
    gigabytes,
    how_to_get,
    hub_cache,
    weights_of,
    weights_of_served,
)
from blipq_worker.serving.footprint import GIB, Load, Memory, memory_of
from blipq_worker.settings import Dtype, Quantization, WorkerSettings

#: The files of a container's limit, and of what it has used.
_LIMIT = ("max", "current")
_CARDS_GIB = (6, 8, 12, 16, 24, 32, 40, 48, 80, 141)


@dataclass(frozen=True, slots=True)
class Gpu:
    """A card as nvidia-smi has it."""

    name: str
    total: int


def gpus() -> list[Gpu]:
    """The GPUs here; none without a driver."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        listed = subprocess.run(query, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return []
    lines = [line.rsplit(",", 1) for line in listed.stdout.splitlines() if "," in line]
    return [
        Gpu(name.strip(), int(total) * 2**20) for name, total in lines if total.strip().isdigit()
    ]


def available_bytes(device: str) -> int | None:
    """Memory that is free for a model on ``cpu``, ``cuda`` or ``cuda:N``; None where unknown."""
    import torch

    on = torch.device(device)
    if on.type == "cuda":
        return int(torch.cuda.mem_get_info(on)[0])
    return _free_memory(Path("/proc/meminfo"), Path("/sys/fs/cgroup"))


def _free_memory(meminfo: Path, cgroup: Path) -> int | None:
    """What the kernel could give, or what a container's limit leaves of it."""
    try:
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None
    try:
        limit, used = ((cgroup / f"memory.{name}").read_text().strip() for name in _LIMIT)
    except OSError:
        return free
    return free if limit == "max" else min(free, int(limit) - int(used))


def shortage(options: WorkerSettings, what: str, device: str, quantization: Any) -> str | None:
    """How much memory a model that is about to be loaded lacks, in a sentence; None if none.

    None, too, where its configuration is not here yet: it comes with the weights.
    """
    free = available_bytes(device)
    try:
        needed = memory_of(
            what,
            quantization=quantization,
            quantize_vision=options.quantize_vision,
            dtype=options.dtype,
            load=load_of(options),
            device=device,
        )
    except ModelError:
        return None
    if free is None or needed.total <= free:
        return None
    return (
        f"{what} takes about {needed.total / GIB:.1f} GiB at its busiest, and {free / GIB:.1f} GiB "
        f"are free on {device}: `blipq models memory {what}` counts what it is made of"
    )


def load_of(options: WorkerSettings) -> Load:
    """What a worker with these settings runs at once."""
    beams = Load().beams
    return Load(
        batch_size=max(1, options.beams // beams),
        beams=beams,
        slots=options.growing_slots,
        feature_cache=options.feature_cache_bytes,
    )


def verdict(memory: Memory, cards: Sequence[Gpu]) -> str:
    """Whether it fits here, in a sentence."""
    needed = f"{memory.total / GIB:.1f} GiB"
    if not cards:
        enough = next((size for size in _CARDS_GIB if memory.total <= 0.92 * size * GIB), None)
        take = f"take a card of at least {enough} GiB" if enough else "no single card holds that"
        return f"no GPU here to compare with: {take}"
    smallest = min(cards, key=lambda card: card.total)
    room = f"{needed} of {smallest.total / GIB:.1f} GiB on {smallest.name}"
    if memory.total > smallest.total:
        return f"does not fit: {room}. Take nf4, a smaller batch or a smaller model"
    if memory.total > 0.92 * smallest.total:
        return f"tight: {room}. Lower BLIPQ_MAX_BATCH_SIZE if it runs out of memory"
    return f"fits: {room}"


# --- the commands ---------------------------------------------------------------------------------


def _list(arguments: argparse.Namespace) -> int:
    known = {
        name: [weights_of(each) for each in (model.generation, model.retrieval) if each]
        for name, model in KNOWN_MODELS.items()
    }
    if arguments.json:
        rows = [
            {"model": name, "about": KNOWN_MODELS[name].about, "checkpoints": _described(found)}
            for name, found in known.items()
        ]
        print(json.dumps({"models": rows, "cache": str(hub_cache()), "free": free_bytes()}))
        return 0
    for name, found in known.items():
        print(f"{name:16} {KNOWN_MODELS[name].about}")
        for each in found:
            print(f"{'':16} {_weights_line(each)}")
    print(f"{'demo':16} coloured shapes on a plain background; comes with blipq")
    print(f"\n{gigabytes(free_bytes())} free in {hub_cache()}")
    print("A worker fetches what it serves; by hand: hf download ID --exclude '*.bin'")
    return 0


def _weights_line(each: Weights) -> str:
    size = "unknown size" if each.bytes is None else gigabytes(each.bytes)
    return f"{each.checkpoint:36} {size:>8}  {'here' if each.present else 'not here'}"


def _described(found: Sequence[Weights]) -> list[dict[str, Any]]:
    return [{**asdict(each), "command": each.command} for each in found]


def _memory(arguments: argparse.Namespace) -> int:
    _require_torch()
    load = Load(**{field.name: getattr(arguments, field.name) for field in fields(Load)})
    memory = memory_of(
        arguments.model,
        quantization=arguments.quantization,
        quantize_vision=arguments.quantize_vision,
        dtype=arguments.dtype,
        load=load,
        device=arguments.device,
    )
    judged = verdict(memory, gpus()) if memory.device == "cuda" else _on_the_cpu(memory)
    if arguments.json:
        sums = {name: getattr(memory, name) for name in _SUMS}
        print(json.dumps({**asdict(memory), **sums, "verdict": judged}))
        return 0
    for line in _memory_lines(memory):
        print(line)
    print(judged)
    return 0


def _on_the_cpu(memory: Memory) -> str:
    free = available_bytes("cpu")
    if free is None:
        return "how much memory is free here cannot be told"
    fits = "fits" if memory.total <= free else "does not fit"
    return f"{fits}: {memory.total / GIB:.1f} GiB of {free / GIB:.1f} GiB that are free here"


_SUMS = ("weights", "shared", "kv_batch", "kv_slots", "activations", "host_cache", "total")


def _memory_lines(memory: Memory) -> Iterator[str]:
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


def _weights(arguments: argparse.Namespace) -> int:
    """For the doctor: the weights of BLIPQ_MODELS, as JSON."""
    found = weights_of_served(checked(WorkerSettings).models)
    missing = [each for each in found if not each.present]
    described = {
        "weights": _described(found),
        "cache": str(hub_cache()),
        "free": free_bytes(),
        "advice": how_to_get(missing) if missing else None,
    }
    print(json.dumps(described))
    return 0


def _require_torch() -> None:
    if importlib.util.find_spec("torch") is None:
        raise ModelError("counting needs torch: pip install 'blipq[worker]'")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="blipq models")
    commands = parser.add_subparsers(required=True)
    listing = commands.add_parser("list")
    listing.set_defaults(run=_list)
    memory = commands.add_parser("memory")
    memory.add_argument("model")
    for field in fields(Load):
        option = f"--{field.name.replace('_', '-')}"
        memory.add_argument(option, type=int, default=field.default)
    memory.add_argument("--quantization", choices=get_args(Quantization), default="auto")
    memory.add_argument("--dtype", choices=get_args(Dtype), default="auto")
    memory.add_argument("--quantize-vision", action="store_true")
    memory.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    memory.set_defaults(run=_memory)
    weights = commands.add_parser("weights")
    weights.set_defaults(run=_weights)
    for command in (listing, memory, weights):
        command.add_argument("--json", action="store_true")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; the exit code."""
    arguments = _parser().parse_args(argv)
    try:
        return int(arguments.run(arguments))
    except BlipqError as error:
        print(f"blipq models: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
