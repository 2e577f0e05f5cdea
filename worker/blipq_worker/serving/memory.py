"""What is free of a device's memory, and whether a model fits."""

import re
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from blipq_worker.catalog.adapters import read_adapter
from blipq_worker.catalog.models import KNOWN_MODELS, PARAMETERS, ModelError, served_model
from blipq_worker.catalog.s3.errors import S3ModelAway
from blipq_worker.catalog.s3.places import is_in_s3
from blipq_worker.serving.footprint import GIB, Load, Memory, memory_of
from blipq_worker.settings import WorkerSettings

#: How weights are kept: in full, or quantized.
Kept = Literal["none", "int8", "nf4"]
KEPT: tuple[Kept, ...] = ("none", "int8", "nf4")

_ONE_DEVICE = re.compile(r"auto|cpu|cuda(:\d{1,3})?")
#: What other libraries call a model that is spread over GPUs.
_SPLIT = ("balanced", "balanced_low_0", "sequential", "device_map")

#: The files of a container's limit, and of what it has used.
_LIMIT = ("max", "current")
#: Bytes of a number of an adapter, at most.
_FULL = 4
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
        f"are free on {device}: `blipq models memory {what}` counts what it is made of; "
        f"{instead(options, what, free, device)}"
    )


def kept_on(device: str, options: WorkerSettings) -> tuple[Kept, str]:
    """How the weights of all models are kept on a device, and why, in a sentence.

    ``auto`` keeps them in full where all of them fit so, and else takes nf4, the smallest: on an
    H100 its steps took up to twice as long as those in 16 bits.
    """
    if options.quantization != "auto":
        return options.quantization, f"BLIPQ_QUANTIZATION={options.quantization}"
    if not device.startswith("cuda"):
        return "none", "not quantized, as on any CPU"
    try:
        needed = sum(_in_full(options, what, device) for what in options.models.values())
        for _, folder in options.adapters.values():
            needed += _FULL * read_adapter(folder).parameters
    except ModelError:  # loading fails, too, with the remedy in its error
        return "nf4", "nf4: how much they take in full is not known"
    free = available_bytes(device) or 0
    sizes = f"in full they take about {needed / GIB:.1f} GiB at their busiest"
    sizes += f", and {free / GIB:.1f} GiB are free on {device}"
    return ("none", f"not quantized: {sizes}") if needed <= free else ("nf4", f"nf4: {sizes}")


def _in_full(options: WorkerSettings, what: str, device: str) -> int:
    """Bytes that a model takes without quantization. Raises ModelError, S3ModelAway."""
    load = load_of(options)

    def count() -> int:
        return memory_of(what, dtype=options.dtype, load=load, device=device).total

    try:
        return count()
    except ModelError:
        _fetch_configurations(what)
        return count()


def _fetch_configurations(what: str) -> None:
    """Fetches the files from which a model's size is counted; nothing where that fails."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    served = served_model("default", what)
    for checkpoint in filter(None, (served.generation, served.retrieval)):
        if is_in_s3(checkpoint):
            continue
        hub_id, _, revision = checkpoint.partition("@")
        with suppress(HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError):
            hf_hub_download(hub_id, "config.json", revision=revision or None)


def load_of(options: WorkerSettings) -> Load:
    """What a worker with these settings runs at once."""
    return Load(
        batch_size=options.max_batch_size,
        slots=options.growing_slots,
        feature_cache=options.feature_cache_bytes,
    )


def for_cards(count: Callable[[Kept], Memory], cards: Sequence[Gpu]) -> Memory:
    """A count in full, or in nf4 where that is more than the smallest card has."""
    full = count("none")
    smallest = min((card.total for card in cards), default=full.total)
    return full if full.total <= smallest else count("nf4")


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


def verdict_on_the_cpu(memory: Memory) -> str:
    """Whether it fits into this machine's memory, in a sentence."""
    free = available_bytes("cpu")
    if free is None:
        return "how much memory is free here is unknown"
    fits = "fits" if memory.total <= free else "does not fit"
    return f"{fits}: {memory.total / GIB:.1f} GiB of {free / GIB:.1f} GiB that are free here"


def require_one_device(options: WorkerSettings) -> None:
    """Raises ModelError for what is no single device; it names what fits on one, with numbers."""
    device = options.device
    if _ONE_DEVICE.fullmatch(device):
        return
    if "," not in device and device not in _SPLIT:
        raise ModelError(f"BLIPQ_DEVICE={device} is none of auto, cpu, cuda and cuda:N")
    cards = gpus()
    room = min((card.total for card in cards), default=None)
    fitting = "; ".join(instead(options, what, room) for what in options.models.values())
    raise ModelError(
        f"BLIPQ_DEVICE={device}: a model is never split over several GPUs. {fitting}. Several GPUs "
        "serve a worker each: `blipq worker --processes`"
    )


def instead(options: WorkerSettings, what: str, room: int | None, device: str = "cuda") -> str:
    """What takes less of a device than ``what`` in full, with numbers, in a sentence.

    room: bytes that there are, of which what does not fit is left out; None where unknown.
    """
    counts = list(_counts(options, what, device))
    fitting = [each for each in counts if room is None or each[1] <= room]
    if not fitting:
        assert room is not None
        name, least = min(counts, key=lambda each: each[1])
        return f"{room / GIB:.1f} GiB hold none: the least is {name}, {least / GIB:.1f} GiB"
    listed = ", ".join(f"{name} {total / GIB:.1f} GiB" for name, total in fitting)
    return listed if room is None else f"{room / GIB:.1f} GiB hold: {listed}"


def _counts(options: WorkerSettings, what: str, device: str) -> Iterator[tuple[str, int]]:
    """What ``what`` and smaller models take in full and quantized: the largest of each first."""
    most = None
    for name in (what, *_smaller(what)):
        for kept in KEPT:
            with suppress(ModelError, S3ModelAway):
                counted = memory_of(
                    name,
                    quantization=kept,
                    quantize_vision=options.quantize_vision,
                    dtype=options.dtype,
                    load=load_of(options),
                    device=device,
                )
                most = most or counted.total
                if counted.total <= most:
                    setting = "in full" if kept == "none" else f"with BLIPQ_QUANTIZATION={kept}"
                    yield f"{name} {setting}", counted.total


def _smaller(what: str) -> list[str]:
    """Known models of the same family with fewer weights; of another model the smallest."""
    if what not in KNOWN_MODELS:
        return ["opt-2.7b"]
    own = PARAMETERS[KNOWN_MODELS[what].generation]
    family, is_coco = what.partition("-")[0], what.endswith("-coco")
    known = {name: PARAMETERS[each.generation] for name, each in KNOWN_MODELS.items()}
    alike = [
        name
        for name, count in known.items()
        if count < own and name.startswith(family) and name.endswith("-coco") == is_coco
    ]
    return sorted(alike, key=known.__getitem__, reverse=True)
