"""What a served model takes of a GPU's memory, counted without loading a weight.

``python -m blipq_worker.memory list | memory MODEL | weights``: what ``blipq models`` and ``blipq
doctor`` run. Parts are counted on torch's meta device, from config.json or, for the published
models, from the numbers below. Weights are exact up to the quantizer's rounding; the activations
are an estimate.
"""

import argparse
import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from blipq.errors import BlipqError
from blipq_worker.models import KNOWN_MODELS, ModelError, served_model
from blipq_worker.settings import Dtype, Quantization, WorkerSettings
from blipq_worker.weights import (
    Weights,
    free_bytes,
    gigabytes,
    how_to_get,
    hub_cache,
    weights_of,
    weights_of_served,
)

if TYPE_CHECKING:
    from blipq_worker.blip2.loading import Precision

GIB = 2**30

#: Bytes per weight of nf4: 4 bits, an 8-bit scale per 64, and an fp32 scale per 256 of those.
_NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
#: The driver's own share, and kernels that are loaded.
_CUDA_CONTEXT = GIB // 2
#: What the allocator cannot use between blocks.
_FRAGMENTATION = 1.1
_CARDS_GIB = (6, 8, 12, 16, 24, 32, 40, 48, 80, 141)

_OPT = {"model_type": "opt", "vocab_size": 50304, "num_hidden_layers": 32}
_T5 = {"model_type": "t5", "vocab_size": 32128, "num_layers": 24, "d_kv": 64}
_T5 |= {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
_OPT_27 = {"hidden_size": 2560, "word_embed_proj_dim": 2560, "ffn_dim": 10240}
_OPT_67 = {"hidden_size": 4096, "word_embed_proj_dim": 4096, "ffn_dim": 16384}

#: The language models of the published checkpoints; all else is transformers' default for BLIP-2.
_LANGUAGE: dict[str, dict[str, Any]] = {
    "opt-2.7b": {**_OPT, **_OPT_27, "num_attention_heads": 32},
    "opt-6.7b": {**_OPT, **_OPT_67, "num_attention_heads": 32},
    "flan-t5-xl": {**_T5, "d_model": 2048, "d_ff": 5120, "num_heads": 32},
    "flan-t5-xxl": {**_T5, "d_model": 4096, "d_ff": 10240, "num_heads": 64},
}


@dataclass(frozen=True, slots=True)
class Part:
    """Weights of one precision in one part of a checkpoint."""

    name: str
    precision: str
    parameters: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Load:
    """What runs at once. tokens: of the prompt (beside the queries) and of the answer."""

    batch_size: int = 16
    beams: int = 5
    prompt_tokens: int = 32
    new_tokens: int = 30

    @property
    def rows(self) -> int:
        """Rows of the language model."""
        return self.batch_size * self.beams


@dataclass(frozen=True, slots=True)
class Memory:
    """What a served model takes, in bytes. ``kv_row`` is one beam of one prompt."""

    model: str
    quantization: str
    load: Load
    parts: tuple[Part, ...]
    kv_row: int
    activations: int
    context: int = _CUDA_CONTEXT

    @property
    def weights(self) -> int:
        """All weights."""
        return sum(part.bytes for part in self.parts)

    @property
    def kv_batch(self) -> int:
        """The KV cache of a whole batch."""
        return self.kv_row * self.load.rows

    @property
    def total(self) -> int:
        """Everything, with what the allocator loses."""
        moving = (self.kv_batch + self.activations) * _FRAGMENTATION
        return self.weights + round(moving) + self.context


@dataclass(frozen=True, slots=True)
class Gpu:
    """A card as nvidia-smi has it."""

    name: str
    total: int


def memory_of(
    what: str,
    *,
    quantization: Quantization = "auto",
    dtype: Dtype = "auto",
    load: Load | None = None,
) -> Memory:
    """What serving ``what`` on a GPU takes (a known model, or ``generation[+retrieval]``)."""
    import torch

    from blipq_worker.blip2.loading import choose_precision

    load = load or Load()
    chosen = "nf4" if quantization == "auto" else quantization
    served = served_model("default", what)
    config = config_of(served.generation)
    family = config.text_config.model_type
    precision = choose_precision(dtype, torch.device("cuda"), family)
    parts = list(parts_of(config, precision, chosen))
    if served.retrieval is not None:
        retrieval = config_of(served.retrieval, retrieval=True)
        matching = choose_precision(dtype, torch.device("cuda"), "retrieval")
        parts += parts_of(retrieval, matching, "none", retrieval=True)
    return Memory(
        model=what,
        quantization=chosen,
        load=load,
        parts=tuple(parts),
        kv_row=_kv_row(config, precision, load),
        activations=_activations(config, precision, chosen, load),
    )


def config_of(checkpoint: str, *, retrieval: bool = False) -> Any:
    """A checkpoint's configuration: the folder's, a published one's, or the cache's."""
    from transformers import Blip2Config

    if Path(checkpoint).expanduser().is_dir():
        return Blip2Config.from_pretrained(Path(checkpoint).expanduser())
    name = checkpoint.partition("@")[0].rpartition("/")[2].removeprefix("blip2-")
    side = {"image_size": 364 if name.endswith("-coco") else 224}
    if checkpoint.startswith("Salesforce/") and name.removesuffix("-coco") in _LANGUAGE:
        text = _LANGUAGE[name.removesuffix("-coco")]
        return Blip2Config(vision_config=side, text_config=text)
    if retrieval and checkpoint.startswith("Salesforce/blip2-itm-vit-g"):
        text_input = {"use_qformer_text_input": True, "vocab_size": 30523}
        return Blip2Config(vision_config=side, qformer_config=text_input)
    for snapshot in hub_cache().glob(f"models--{checkpoint.replace('/', '--')}/snapshots/*"):
        return Blip2Config.from_pretrained(snapshot)
    raise ModelError(
        f"the configuration of {checkpoint!r} is not here: name a known model "
        f"({', '.join(KNOWN_MODELS)}) or a folder, or run `hf download {checkpoint} config.json`"
    )


def parts_of(
    config: Any, precision: "Precision", quantization: str, *, retrieval: bool = False
) -> Iterator[Part]:
    """The weights of a checkpoint as loading.py loads them, part by part."""
    import torch

    with torch.device("meta"):
        model = _model_class(retrieval=retrieval)(config)
    quantized = set() if quantization == "none" else _quantized_weights(model, config)
    counts: dict[tuple[str, str], list[float]] = {}
    for name, weight in _stored(model, config):
        part, kept = _place(name, precision)
        if name in quantized:
            label, size = quantization, _quantized_bytes(weight, quantization)
        else:
            label, size = str(kept).removeprefix("torch."), weight.numel() * kept.itemsize
        key = (f"retrieval {part}" if retrieval else part, label)
        count = counts.setdefault(key, [0, 0])
        count[0] += weight.numel()
        count[1] += size
    for (part, label), (parameters, size) in counts.items():
        yield Part(part, label, int(parameters), round(size))


def _model_class(*, retrieval: bool) -> Any:
    import transformers

    if retrieval:
        return transformers.Blip2ForImageTextRetrieval
    return transformers.Blip2ForConditionalGeneration


def _stored(model: Any, config: Any) -> Iterator[tuple[str, Any]]:
    """Every weight once, and the output layer where it is not the input's."""
    yield from model.named_parameters()
    # Transformers calls every T5 tied, and remembers by this that Flan's output layer is its own.
    if not getattr(config.text_config, "scale_decoder_outputs", True):
        head = getattr(getattr(model, "language_model", None), "lm_head", None)
        if head is not None:
            yield "language_model.lm_head.weight", head.weight


_PARTS = {
    "vision_model": "vision tower",
    "language_projection": "projection",
    "language_model": "language model",
    "itm_head": "heads",
    "vision_projection": "heads",
    "text_projection": "heads",
}


def _place(name: str, precision: "Precision") -> tuple[str, Any]:
    """The part that a weight belongs to, and the type it is kept in."""
    import torch

    part = _PARTS.get(name.partition(".")[0], "q-former")
    if part == "language model":
        return part, precision.language
    return part, precision.vision if part in ("vision tower", "projection") else torch.float32


def _quantized_weights(model: Any, config: Any) -> set[str]:
    """The linear layers of the language model, less those that loading.py and T5 keep."""
    import torch

    kept = {"lm_head"} | ({"wo"} if config.text_config.model_type == "t5" else set())
    return {
        f"language_model.{name}.weight"
        for name, module in model.language_model.named_modules()
        if isinstance(module, torch.nn.Linear) and name.rpartition(".")[2] not in kept
    }


def _quantized_bytes(weight: Any, quantization: str) -> float:
    if quantization == "nf4":
        return float(weight.numel() * _NF4_BYTES)
    return float(weight.numel() + 4 * weight.shape[0])  # int8, and an fp32 scale per output


def _kv_row(config: Any, precision: "Precision", load: Load) -> int:
    """Keys and values of one row at its longest."""
    text = config.text_config
    prompt = config.num_query_tokens + load.prompt_tokens
    if text.model_type == "t5":
        # Of the encoder's output once, and of what the decoder has written.
        layers, width = text.num_decoder_layers, text.num_heads * text.d_kv
    else:
        layers, width = text.num_hidden_layers, text.hidden_size
    return int(2 * layers * width * (prompt + load.new_tokens) * precision.language.itemsize)


def _activations(config: Any, precision: "Precision", quantization: str, load: Load) -> int:
    """The largest of the passes: one layer's states, the logits, and a dequantized layer."""
    vision, text = config.vision_config, config.text_config
    tokens = (vision.image_size // vision.patch_size) ** 2 + 1
    per_token = 3 * vision.hidden_size + 2 * vision.intermediate_size
    seeing = load.batch_size * tokens * per_token * precision.vision.itemsize
    hidden, inner = (
        (text.d_model, text.d_ff) if text.model_type == "t5" else (text.hidden_size, text.ffn_dim)
    )
    prompt = config.num_query_tokens + load.prompt_tokens
    reading = load.rows * prompt * (3 * hidden + 2 * inner) * precision.language.itemsize
    logits = load.rows * text.vocab_size * 4 * 4  # fp32, and the copies that beam search makes
    layer = 0 if quantization == "none" else hidden * inner * precision.language.itemsize
    return int(max(seeing, reading + layer) + logits)


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
    load = Load(
        arguments.batch_size, arguments.beams, arguments.prompt_tokens, arguments.new_tokens
    )
    memory = memory_of(
        arguments.model, quantization=arguments.quantization, dtype=arguments.dtype, load=load
    )
    judged = verdict(memory, gpus())
    if arguments.json:
        sums = {"weights": memory.weights, "kv_batch": memory.kv_batch, "total": memory.total}
        print(json.dumps({**asdict(memory), **sums, "verdict": judged}))
        return 0
    for line in _memory_lines(memory):
        print(line)
    print(judged)
    return 0


def _memory_lines(memory: Memory) -> Iterator[str]:
    load = memory.load
    yield f"{memory.model}, {memory.quantization}, batches of {load.batch_size}"
    for part in memory.parts:
        millions = f"{part.parameters / 1e6:,.1f} M"
        yield f"  {part.name:24} {part.precision:9} {millions:>11}  {part.bytes / GIB:7.2f} GiB"
    row = f"{load.batch_size} x {load.beams} beams x {memory.kv_row / 2**20:.1f} MiB"
    for name, note, count in (
        ("weights", "", memory.weights),
        ("KV cache", row, memory.kv_batch),
        ("activations", "estimate", memory.activations),
        ("CUDA context", "estimate", memory.context),
        ("total", "", memory.total),
    ):
        yield f"  {name:14} {note:31}  {count / GIB:7.2f} GiB"


def _weights(arguments: argparse.Namespace) -> int:
    """For the doctor: the weights of BLIPQ_MODELS, as JSON."""
    found = weights_of_served(WorkerSettings().models)
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
    default = Load()
    memory.add_argument("--batch-size", type=int, default=default.batch_size)
    memory.add_argument("--beams", type=int, default=default.beams)
    memory.add_argument("--prompt-tokens", type=int, default=default.prompt_tokens)
    memory.add_argument("--new-tokens", type=int, default=default.new_tokens)
    memory.add_argument("--quantization", choices=get_args(Quantization), default="auto")
    memory.add_argument("--dtype", choices=get_args(Dtype), default="auto")
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
