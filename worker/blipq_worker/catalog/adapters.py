"""LoRA adapters over a served model: their names, and what a folder that PEFT saved holds.

Without torch: `blipq models` and `blipq doctor` read headers alone.
"""

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from blipq_worker.catalog.models import VARIANTS, ModelError
from blipq_worker.catalog.weights import ADAPTER as CONFIG
from blipq_worker.catalog.weights import expanded, is_lfs_pointer

WEIGHTS = "adapter_model.safetensors"
#: The highest rank that is served.
MOST_RANK = 64

_PICKLED = ("adapter_model.bin", "adapter_model.pt")
_NUMBERS = ("F32", "F16", "BF16")
_TENSOR = re.compile(r"base_model\.model\.(?P<layer>.+)\.lora_(?P<side>[AB])\.weight")
_OPT = r"language_model\.model\.decoder\.layers\.\d+\."
_T5 = r"language_model\.(encoder|decoder)\.block\.\d+\.layer\.\d+\."
#: Layers that may have adapters.
_TARGET = re.compile(
    rf"{_OPT}(self_attn\.(q_proj|k_proj|v_proj|out_proj)|fc1|fc2)"
    rf"|{_T5}((Self|EncDec)Attention\.[qkvo]|DenseReluDense\.(wi|wi_0|wi_1|wo))"
    r"|qformer\.encoder\.layer\.\d+\.(attention|crossattention)\.attention\.(query|key|value)"
)
_MERGE = "merge it into its base with peft's merge_and_unload and serve the result as a model"
#: What of a configuration changes the computation, by the name of its field.
_REFUSED = {
    "use_dora": "DoRA",
    "modules_to_save": "whole modules beside it",
    "lora_bias": "biases",
    "fan_in_fan_out": "weights stored the other way round",
    "layer_replication": "layers that are there several times",
    "trainable_token_indices": "embeddings of single tokens",
    "target_parameters": "parameters that are no layer's",
    "use_qalora": "QALoRA",
    "use_bdlora": "BD-LoRA",
    "alora_invocation_tokens": "aLoRA",
    "arrow_config": "Arrow",
    "megatron_config": "Megatron's layers",
}
#: Beginnings of ``init_lora_weights`` that change the base's own weights, too.
_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


class Flaw(StrEnum):
    """Why an adapter is not served. Stable; each message begins with one."""

    UNREADABLE = "adapter_unreadable"
    UNSUPPORTED = "adapter_unsupported"
    MISFIT = "adapter_misfit"


class AdapterError(ModelError):
    """An adapter cannot be served."""

    def __init__(self, code: Flaw, text: str) -> None:
        super().__init__(f"{code}: {text}")
        self.code = code
        self.text = text


class Target(NamedTuple):
    """What an adapter adds to a layer: ``scale`` x B(A(x)), with A of ``rank`` rows."""

    rank: int
    inputs: int
    outputs: int
    scale: float


@dataclass(frozen=True, slots=True)
class Adapter:
    """A folder that PEFT saved. trained_on: the base that it names. targets: by layer."""

    folder: Path
    trained_on: str
    targets: dict[str, Target]

    @property
    def parameters(self) -> int:
        """Numbers in all of its matrices."""
        return sum(each.rank * (each.inputs + each.outputs) for each in self.targets.values())

    @property
    def rank(self) -> int:
        """The highest one."""
        return max(each.rank for each in self.targets.values())

    @property
    def changes_queries(self) -> bool:
        """Whether it makes other queries of an image: it is on the Q-Former, too."""
        return any(layer.startswith("qformer.") for layer in self.targets)

    @property
    def file(self) -> Path:
        """Its weights."""
        return self.folder / WEIGHTS

    def digest(self) -> str:
        """The SHA-256 of its weights and its configuration."""
        found = hashlib.sha256()
        for name in (WEIGHTS, CONFIG):
            found.update(hashlib.sha256((self.folder / name).read_bytes()).digest())
        return found.hexdigest()

    def require_base(self, checkpoint: str) -> None:
        """Raises AdapterError if it is known to be trained on another published checkpoint."""
        base = checkpoint.partition("@")[0]
        known = base in VARIANTS and self.trained_on in VARIANTS
        if known and self.trained_on != base:
            message = f"{self.folder} was trained on {self.trained_on}, and is over {base}"
            raise AdapterError(Flaw.MISFIT, message)


def read_adapter(path: str) -> Adapter:
    """What a folder holds, without its numbers. Raises AdapterError."""
    folder = expanded(path)
    config = _config(folder)
    _require_plain_lora(folder, config)
    shapes = _shapes(folder)
    targets = {}
    for layer in dict.fromkeys(layer for layer, _ in shapes):
        _require_target(folder, layer)
        targets[layer] = _target(folder, layer, shapes, config)
    if not targets:
        raise AdapterError(Flaw.UNREADABLE, f"{folder / WEIGHTS} holds no tensors")
    return Adapter(folder, str(config.get("base_model_name_or_path") or ""), targets)


@dataclass(frozen=True, slots=True)
class Described:
    """An adapter for people. bytes: of its weights' file. problem: why it cannot be served."""

    name: str
    base: str
    folder: str
    rank: int | None = None
    parameters: int | None = None
    bytes: int | None = None
    problem: str | None = None


def describe_all(adapters: Mapping[str, tuple[str, str]]) -> Iterator[Described]:
    """Adapters by name, with base and folder; those that cannot be served among them."""
    for name, (base, folder) in adapters.items():
        try:
            found = read_adapter(folder)
            size = found.file.stat().st_size
            yield Described(name, base, folder, found.rank, found.parameters, size)
        except (AdapterError, OSError) as error:
            yield Described(name, base, folder, problem=str(error))


def _config(folder: Path) -> dict[str, Any]:
    file = folder / CONFIG
    if not file.is_file():
        message = f"{folder} has no {CONFIG}: name a folder that peft's save_pretrained wrote"
        raise AdapterError(Flaw.UNREADABLE, message)
    try:
        found = json.loads(file.read_bytes().decode())
    except (OSError, ValueError) as error:
        raise AdapterError(Flaw.UNREADABLE, f"{file} is unreadable: {error}") from error
    if not isinstance(found, dict):
        raise AdapterError(Flaw.UNREADABLE, f"{file} holds no JSON object")
    return found


def _require_plain_lora(folder: Path, config: Mapping[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        message = f"{folder} is of peft's type {config.get('peft_type')!r}: LoRA is served"
        raise AdapterError(Flaw.UNSUPPORTED, message)
    found = [f"{what} ({field})" for field, what in _REFUSED.items() if config.get(field)]
    if config.get("bias", "none") != "none":
        found.append("biases (bias)")
    begun = str(config.get("init_lora_weights", True)).lower()
    if begun.startswith(_CHANGE_THE_BASE):
        found.append(f"changes to its base (init_lora_weights={begun!r})")
    if found:
        message = f"{folder} has {' and '.join(found)}, beside plain LoRA: {_MERGE}"
        raise AdapterError(Flaw.UNSUPPORTED, message)


def _shapes(folder: Path) -> dict[tuple[str, str], tuple[int, int]]:
    """The shapes of A and B, by layer and side."""
    file = folder / WEIGHTS
    if not file.is_file():
        pickled = [name for name in _PICKLED if (folder / name).is_file()]
        instead = f", but {pickled[0]}, a pickle, which is not loaded" if pickled else ""
        message = f"{folder} has no {WEIGHTS}{instead}: save it again with a recent peft"
        raise AdapterError(Flaw.UNREADABLE, message)
    try:
        if is_lfs_pointer(file):
            message = f"{file} is in Git LFS and not here: run `git lfs pull`"
            raise AdapterError(Flaw.UNREADABLE, message)
        with safe_open(file, framework="np") as stored:
            names = stored.keys()
            return dict(_shape(file, name, stored.get_slice(name)) for name in names)
    except (OSError, SafetensorError) as error:
        raise AdapterError(Flaw.UNREADABLE, f"{file} is unreadable: {error}") from error


def _shape(file: Path, name: str, stored: Any) -> tuple[tuple[str, str], tuple[int, int]]:
    found = _TENSOR.fullmatch(name)
    if found is None:
        message = f"{file} holds {name}, which is no matrix of plain LoRA: {_MERGE}"
        raise AdapterError(Flaw.UNSUPPORTED, message)
    shape, kind = tuple(stored.get_shape()), stored.get_dtype()
    if len(shape) != 2 or kind not in _NUMBERS:
        message = f"{file}: {name} is {kind} of the shape {shape}, and no matrix of floats"
        raise AdapterError(Flaw.UNREADABLE, message)
    return (found["layer"], found["side"]), (shape[0], shape[1])


def _require_target(folder: Path, layer: str) -> None:
    if _TARGET.fullmatch(layer):
        return
    if layer.startswith("vision_model."):
        message = (
            f"{folder} changes the vision tower ({layer}), which all models share: train with "
            "target_modules that name layers of the language model or the Q-Former alone, such as "
            r"'.*language_model.*\.(fc1|fc2)'"
        )
    else:
        message = (
            f"{folder} changes {layer}: served are q_proj, k_proj, v_proj, out_proj, fc1 and fc2 "
            "of OPT, q, k, v, o, wi, wi_0, wi_1 and wo of T5, and query, key and value of the "
            "Q-Former"
        )
    raise AdapterError(Flaw.UNSUPPORTED, f"{message}; or {_MERGE}")


def _target(
    folder: Path,
    layer: str,
    shapes: Mapping[tuple[str, str], tuple[int, int]],
    config: Mapping[str, Any],
) -> Target:
    try:
        (rank, inputs), (outputs, other) = shapes[layer, "A"], shapes[layer, "B"]
    except KeyError:
        message = f"{folder / WEIGHTS} has one of two matrices of {layer}"
        raise AdapterError(Flaw.UNREADABLE, message) from None
    if rank != other or rank == 0:
        message = f"{folder / WEIGHTS}: the matrices of {layer} have the ranks {rank} and {other}"
        raise AdapterError(Flaw.UNREADABLE, message)
    if rank > MOST_RANK:
        message = f"{folder} has the rank {rank} at {layer}: at most {MOST_RANK} are served"
        raise AdapterError(Flaw.UNSUPPORTED, f"{message}; {_MERGE}")
    try:
        alpha = _alpha(layer, config)
    except (TypeError, ValueError, KeyError, re.error) as error:
        message = f"{folder / CONFIG} has no usable lora_alpha: {type(error).__name__}: {error}"
        raise AdapterError(Flaw.UNREADABLE, message) from error
    return Target(
        rank, inputs, outputs, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    )


def _alpha(layer: str, config: Mapping[str, Any]) -> float:
    """As PEFT finds it: the first pattern that a layer's name ends with, else that of all."""
    patterns: Mapping[str, Any] = config.get("alpha_pattern") or {}
    matching: Iterator[Any] = (
        value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", layer)
    )
    alpha = float(next(matching, config["lora_alpha"]))
    if not math.isfinite(alpha):
        raise ValueError(f"it is {alpha}")
    return alpha
