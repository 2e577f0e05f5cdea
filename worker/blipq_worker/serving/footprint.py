"""What a served model takes of a device's memory, counted without loading a weight.

Parts are counted from config.json or, for the published models, from the numbers below. Weights are
exact up to the quantizer's rounding, keys and values are exact for what runs at once; the
activations are an estimate. Torch is imported where it is needed, and transformers' models nowhere.
"""

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blipq_worker.catalog.adapters import read_adapter
from blipq_worker.catalog.models import KNOWN_MODELS, VARIANTS, ModelError, served_model
from blipq_worker.catalog.s3.objects import Objects
from blipq_worker.catalog.s3.places import is_in_s3, place_of
from blipq_worker.catalog.weights import expanded, hub_cache
from blipq_worker.serving.sizes import Size, sizes_of
from blipq_worker.settings import Dtype, Quantization

if TYPE_CHECKING:
    from blipq_worker.blip2.loading.precision import Precision
    from blipq_worker.blip2.loading.quantizing import Quantizing

GIB = 2**30

#: Bytes per weight of nf4: 4 bits, an 8-bit scale per 64, and an fp32 scale per 256 of those.
_NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
#: The driver's own share and kernels that are loaded; on a CPU, Python, torch and transformers.
_CONTEXT = GIB // 2
#: What the allocator cannot use between blocks.
_FRAGMENTATION = 1.1

_OPT = {"model_type": "opt", "vocab_size": 50304, "num_hidden_layers": 32}
_T5 = {"model_type": "t5", "vocab_size": 32128, "num_layers": 24, "d_kv": 64}
_T5 |= {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
_LLAMA = {"model_type": "llama", "vocab_size": 32001}
_OPT_27 = {"hidden_size": 2560, "word_embed_proj_dim": 2560, "ffn_dim": 10240}
_OPT_67 = {"hidden_size": 4096, "word_embed_proj_dim": 4096, "ffn_dim": 16384}
_WIDE_7 = {"hidden_size": 4096, "intermediate_size": 11008}
_WIDE_13 = {"hidden_size": 5120, "intermediate_size": 13824}

#: The words of Q-Formers that read texts.
_WORDS = 30523
#: The language models of the published checkpoints; all else is transformers' default for BLIP-2
#: and InstructBLIP.
_LANGUAGE: dict[str, dict[str, Any]] = {
    "opt-2.7b": {**_OPT, **_OPT_27, "num_attention_heads": 32},
    "opt-6.7b": {**_OPT, **_OPT_67, "num_attention_heads": 32},
    "flan-t5-xl": {**_T5, "d_model": 2048, "d_ff": 5120, "num_heads": 32},
    "flan-t5-xxl": {**_T5, "d_model": 4096, "d_ff": 10240, "num_heads": 64},
    "vicuna-7b": {**_LLAMA, **_WIDE_7, "num_hidden_layers": 32, "num_attention_heads": 32},
    "vicuna-13b": {**_LLAMA, **_WIDE_13, "num_hidden_layers": 40, "num_attention_heads": 40},
}


#: What heat maps have of their own, in fp32 as these are kept in any case.
_HEAT_MAPS = ("retrieval q-former", "retrieval heads")


@dataclass(frozen=True, slots=True)
class Part:
    """Weights of one precision in one part of a checkpoint."""

    name: str
    precision: str
    parameters: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Load:
    """What runs at once, at the most.

    batch_size images with beams texts each, in one pass of the model; beside them, texts in flight
    in slots of slot_tokens keys and values. tokens: of the prompt (beside the queries) and of the
    answer. feature_cache: bytes of host memory for what was seen of images.
    """

    batch_size: int = 16
    beams: int = 5
    prompt_tokens: int = 32
    new_tokens: int = 30
    slots: int = 32
    slot_tokens: int = 256
    feature_cache: int = 0

    @property
    def rows(self) -> int:
        """Rows of the language model in a pass."""
        return self.batch_size * self.beams


@dataclass(frozen=True, slots=True)
class Memory:
    """What a served model takes, in bytes. ``kv_token`` is one token of one row.

    shared: of the retrieval checkpoint's tower, which is not loaded where it equals the other.
    context: of the driver, or of the process on a CPU.
    """

    model: str
    device: str
    quantization: str
    load: Load
    parts: tuple[Part, ...]
    kv_token: int
    kv_row: int
    vision: int
    language: int
    context: int = _CONTEXT

    @property
    def weights(self) -> int:
        """Bytes of all weights."""
        return sum(part.bytes for part in self.parts)

    @property
    def shared(self) -> int:
        """Weights of a second vision tower."""
        return sum(part.bytes for part in self.parts if part.name == "retrieval vision tower")

    @property
    def kv_batch(self) -> int:
        """Keys and values of a whole pass with beams."""
        return self.kv_row * self.load.rows

    @property
    def kv_slots(self) -> int:
        """Keys and values of the texts in flight."""
        return self.kv_token * self.load.slots * self.load.slot_tokens

    @property
    def activations(self) -> int:
        """Of the larger of the passes: they run one after the other."""
        return max(self.vision, self.language)

    @property
    def heat_maps(self) -> int:
        """Beside the total: what is kept a second time once a match was explained."""
        return sum(part.bytes for part in self.parts if part.name in _HEAT_MAPS)

    @property
    def host_cache(self) -> int:
        """The feature cache, where it is in the same memory."""
        return self.load.feature_cache if self.device == "cpu" else 0

    @property
    def total(self) -> int:
        """Everything, with what the allocator loses."""
        moving, fixed = self.kv_batch + self.activations, self.weights + self.host_cache
        if self.device == "cpu":
            moving += self.kv_slots  # they grow with the texts in them
        else:
            fixed += self.kv_slots  # in one piece, from the start
        return fixed + round(moving * _FRAGMENTATION) + self.context


def memory_of(
    what: str,
    *,
    quantization: Quantization = "auto",
    quantize_vision: bool = False,
    dtype: Dtype = "auto",
    load: Load | None = None,
    device: str = "cuda",
    adapters: Sequence[str] = (),
) -> Memory:
    """What serving ``what`` takes (a known model, or ``generation[+retrieval]``).

    quantization: ``auto`` counts the weights in full, as a worker keeps them where they fit.
    adapters: folders of LoRA adapters over it. Raises AdapterError for these, ModelError where
    its configuration is not to be had, and S3ModelAway.
    """
    import torch

    from blipq_worker.blip2.loading.precision import choose_precision
    from blipq_worker.blip2.loading.quantizing import Quantizing

    load = load or Load()
    on = torch.device(device)
    quantizing = Quantizing("none" if quantization == "auto" else quantization, quantize_vision)
    served = served_model("default", what)
    config = config_of(served.generation)
    precision = choose_precision(dtype, on, config.text_config.model_type)
    if config.model_type == "instructblip" and on.type == "cuda":
        load = replace(load, slot_tokens=2 * load.slot_tokens)  # its static slots are as long
    parts = list(parts_of(config, precision, quantizing))
    if served.retrieval is not None:
        retrieval = config_of(served.retrieval, retrieval=True)
        matching = choose_precision(dtype, on, "retrieval")
        parts += parts_of(retrieval, matching, quantizing, retrieval=True)
    parts += [_adapter_part(folder, precision) for folder in adapters]
    kv_token = _kv_token(config, precision)
    tokens = config.num_query_tokens + load.prompt_tokens + load.new_tokens
    return Memory(
        model=what,
        device=on.type,
        quantization=str(quantizing),
        load=load,
        parts=tuple(parts),
        kv_token=kv_token,
        kv_row=kv_token * tokens,
        vision=_vision(config, precision, load),
        language=_language(config, precision, quantizing, load),
    )


def loaded_bytes(model: Any) -> int:
    """What the weights of a loaded model take, quantized ones with their scales."""
    weights = {id(weight): weight for weight in (*model.parameters(), *model.buffers())}
    scales = {id(each): each for weight in weights.values() for each in _scales(weight)}
    return sum(each.nbytes for each in (*weights.values(), *scales.values()))


def _scales(weight: Any) -> Iterator[Any]:
    """The tensors beside a weight that bitsandbytes needs to use it."""
    if (scale := getattr(weight, "SCB", None)) is not None:  # int8
        yield scale
    state = getattr(weight, "quant_state", None)
    while state is not None:  # nf4: the scales have scales, until a CPU unpacks them at first use
        yield state.absmax
        state = getattr(state, "state2", None)


def config_of(checkpoint: str, *, retrieval: bool = False) -> Any:
    """A checkpoint's configuration: the folder's, S3's, a published one's, or the cache's.

    Raises ModelError, and S3ModelAway.
    """
    if is_in_s3(checkpoint):
        return _config_in_s3(checkpoint)
    if expanded(checkpoint).is_dir():
        return _stored_config(expanded(checkpoint))
    published = _published_config(checkpoint.partition("@")[0], retrieval)
    if published is not None:
        return published
    repository = checkpoint.partition("@")[0].replace("/", "--")
    for snapshot in hub_cache().glob(f"models--{repository}/snapshots/*"):
        return _stored_config(snapshot)
    raise ModelError(
        f"the configuration of {checkpoint!r} is not here: name a known model "
        f"({', '.join((*KNOWN_MODELS, 'demo'))}) or a folder, or run "
        f"`hf download {checkpoint} config.json`"
    )


def _published_config(hub_id: str, retrieval: bool) -> Any:
    """That of a published checkpoint; None for any other."""
    from transformers import Blip2Config, InstructBlipConfig

    kind, _, language = hub_id.removeprefix("Salesforce/").partition("-")
    side = {"image_size": 364 if language.endswith("-coco") else 224}
    text = _LANGUAGE.get(language.removesuffix("-coco"))
    words: dict[str, Any] = {"vocab_size": _WORDS}
    if hub_id not in VARIANTS:
        return None
    if kind == "instructblip":
        return InstructBlipConfig(vision_config=side, qformer_config=words, text_config=text)
    if text is not None:
        return Blip2Config(vision_config=side, text_config=text)
    if retrieval:
        words["use_qformer_text_input"] = True
        return Blip2Config(vision_config=side, qformer_config=words)
    return None


def _config_in_s3(checkpoint: str) -> Any:
    objects = Objects(place_of(checkpoint))
    data = objects.small("config.json", objects.manifest())
    with tempfile.TemporaryDirectory(prefix="blipq-checkpoint-") as folder:
        (Path(folder) / "config.json").write_bytes(data)
        return _stored_config(Path(folder))


def _stored_config(folder: Path) -> Any:
    from blipq_worker.blip2.loading.configs import LANGUAGES, is_served, read_config

    file = folder / "config.json"
    if not file.is_file():  # of which transformers would make a model of its own
        raise ModelError(f"{folder} has no config.json: name a folder that save_pretrained wrote")
    try:
        config = read_config(folder)
    except Exception as error:  # transformers raises many kinds on a malformed configuration
        reason = " ".join(str(error).split())
        raise ModelError(f"{file} is unusable: {reason}") from error
    if not is_served(config):
        raise ModelError(f"{file} is of {config.model_type!r}, not of BLIP-2 or InstructBLIP")
    if config.text_config.model_type not in LANGUAGES:
        language = config.text_config.model_type
        raise ModelError(
            f"{file} has the language model {language!r}: OPT, T5 and Llama are served"
        )
    return config


def parts_of(
    config: Any, precision: "Precision", quantizing: "Quantizing", *, retrieval: bool = False
) -> Iterator[Part]:
    """The weights of a checkpoint as ``loading`` keeps them, part by part."""
    for size in sizes_of(config, retrieval=retrieval):
        name = f"retrieval {size.part}" if retrieval else size.part
        kept = _kept(size.part, precision)
        label = str(kept).removeprefix("torch.")
        if not _is_quantized(size.part, quantizing):
            count = size.rest + size.linear
            yield Part(name, label, count, count * kept.itemsize)
            continue
        yield Part(name, label, size.rest, size.rest * kept.itemsize)
        yield Part(name, quantizing.method, size.linear, _quantized_bytes(size, quantizing.method))


def _adapter_part(folder: str, precision: "Precision") -> Part:
    """An adapter's weights: of the language model in its type, of the Q-Former in fp32."""
    adapter = read_adapter(folder)
    size = 0
    for layer, target in adapter.targets.items():
        kept = _kept("q-former" if layer.startswith("qformer.") else "language model", precision)
        size += target.rank * (target.inputs + target.outputs) * kept.itemsize
    label = str(precision.language).removeprefix("torch.")
    return Part(f"adapter {adapter.folder.name}", label, adapter.parameters, size)


def _kept(part: str, precision: "Precision") -> Any:
    """The type that a part is kept in, where it is not quantized."""
    import torch

    if part == "language model":
        return precision.language
    return precision.vision if part in ("vision tower", "projection") else torch.float32


def _is_quantized(part: str, quantizing: "Quantizing") -> bool:
    quantized = ("language model", *(["vision tower"] if quantizing.vision else []))
    return quantizing.method != "none" and part in quantized


def _quantized_bytes(size: Size, quantization: str) -> int:
    if quantization == "nf4":
        return round(size.linear * _NF4_BYTES)
    return size.linear + 4 * size.rows  # int8, and an fp32 scale per output


def _kv_token(config: Any, precision: "Precision") -> int:
    """Keys and values of one token: for T5, of the encoder's output or of what was written."""
    text = config.text_config
    if text.model_type == "t5":
        layers, width = text.num_decoder_layers, text.num_heads * text.d_kv
    elif text.model_type == "llama":  # of all heads: see ``LlamaStep``
        layers, width = text.num_hidden_layers, text.num_attention_heads * text.head_dim
    else:
        layers, width = text.num_hidden_layers, text.hidden_size
    return int(2 * layers * width * precision.language.itemsize)


def _vision(config: Any, precision: "Precision", load: Load) -> int:
    """One layer's states of the vision tower for a batch; its attention keeps no matrix.

    In bf16 a CPU's attention keeps one, of the few images that it takes at once: it is not counted.
    """
    vision = config.vision_config
    tokens = (vision.image_size // vision.patch_size) ** 2 + 1
    per_token = 3 * vision.hidden_size + 2 * vision.intermediate_size
    return int(load.batch_size * tokens * per_token * precision.vision.itemsize)


def _language(config: Any, precision: "Precision", quantizing: "Quantizing", load: Load) -> int:
    """One layer's states of all prompts, the logits, and a layer that is dequantized."""
    text = config.text_config
    inners = {"opt": "ffn_dim", "t5": "d_ff", "llama": "intermediate_size"}
    hidden, inner = text.hidden_size, getattr(text, inners[text.model_type])
    prompt = config.num_query_tokens + load.prompt_tokens
    reading = load.rows * prompt * (3 * hidden + 2 * inner) * precision.language.itemsize
    logits = load.rows * text.vocab_size * 4 * 4  # fp32, and the copies that beam search makes
    layer = 0 if quantizing.method == "none" else hidden * inner * precision.language.itemsize
    return int(reading + logits + layer)
