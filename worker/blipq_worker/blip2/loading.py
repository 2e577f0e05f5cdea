"""Loads a checkpoint's weights: precision part by part, quantization, device.

LAVIS computes the vision tower in fp16, OPT in fp16, T5 in bf16, and the Q-Former, the query tokens
and the matching heads in fp32. Transformers alone keeps the Q-Former in fp32 for fp16 only, and an
ordinary cast after loading would undo even that, so the types are decided while loading.
"""

import logging
from dataclasses import dataclass
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from transformers import (
    AutoTokenizer,
    BitsAndBytesConfig,
    Blip2ForConditionalGeneration,
    Blip2ForImageTextRetrieval,
)

from blipq_worker.blip2.checkpoints import Checkpoint, CheckpointError, Family

Quantization = Literal["none", "int8", "nf4"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]

# Only the language model is quantized: the vision tower is what every answer rests on. By itself
# bitsandbytes would take the tower and the projection, too; and a list replaces its own default,
# which is why lm_head must be in it.
_NOT_QUANTIZED = ["vision_model", "qformer", "language_projection", "lm_head"]


@dataclass(frozen=True, slots=True)
class Precision:
    """Compute types of the vision tower and of the language model; all else is fp32."""

    vision: torch.dtype
    language: torch.dtype

    def __str__(self) -> str:
        names = [str(part).removeprefix("torch.") for part in (self.vision, self.language)]
        return "/".join(dict.fromkeys(names))


def choose_precision(dtype: Dtype, device: torch.device, family: Family) -> Precision:
    """The types for ``dtype``; ``auto`` is LAVIS's mix on a GPU and bf16 on CPUs that have it.

    With float16, T5 itself still gets bf16: its activations overflow fp16. Raises ValueError for
    fp16 on a CPU, which is slower there than fp32 by an order of magnitude.
    """
    if device.type == "cpu":
        if dtype == "float16":
            raise ValueError("float16 is not for CPUs: choose bfloat16, float32 or auto")
        if dtype == "auto":
            dtype = "bfloat16" if _cpu_has_bfloat16() else "float32"
    vision: torch.dtype = torch.float16 if dtype == "auto" else getattr(torch, dtype)
    language = torch.bfloat16 if family == "t5" and vision == torch.float16 else vision
    return Precision(vision, language)


def _cpu_has_bfloat16() -> bool:
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


class _ByParts:
    """Gives each part its own type while transformers loads it."""

    precision: Precision

    def _get_dtype_plan(self, dtype: torch.dtype) -> dict[str, torch.dtype]:
        # Keys are regular expressions over parameter names; what none matches gets `dtype`.
        fp32 = ("^query_tokens", "^qformer", "^embeddings", "^itm_head")
        plan = dict.fromkeys((*fp32, "^vision_projection", "^text_projection"), torch.float32)
        return {**plan, "^language_model": self.precision.language}


class _Generation(_ByParts, Blip2ForConditionalGeneration):  # type: ignore[misc]
    pass


class _Retrieval(_ByParts, Blip2ForImageTextRetrieval):  # type: ignore[misc]
    pass


def load_weights(
    checkpoint: Checkpoint, precision: Precision, quantization: Quantization, device: torch.device
) -> Any:
    """The model of the checkpoint on ``device``: frozen, in evaluation mode, attention by SDPA.

    Raises CheckpointError where weights are missing, rather than run on random ones.
    """
    base = _Retrieval if checkpoint.family == "retrieval" else _Generation
    model_class: Any = type(base.__name__, (base,), {"precision": precision})
    try:
        model, report = model_class.from_pretrained(
            checkpoint.folder,
            dtype=precision.vision,
            attn_implementation="sdpa",
            quantization_config=_quantization(checkpoint.family, precision, quantization),
            device_map={"": device},
            output_loading_info=True,
        )
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"the weights of checkpoint {checkpoint.name!r} cannot be loaded: {error}"
        ) from error
    if report["missing_keys"]:
        some = ", ".join(sorted(report["missing_keys"])[:3])
        raise CheckpointError(f"checkpoint {checkpoint.name!r} lacks weights, such as {some}")
    return model.requires_grad_(False).eval()


def _quantization(family: Family, precision: Precision, quantization: Quantization) -> Any:
    if quantization == "none" or family == "retrieval":
        return None  # a retrieval checkpoint has no language model
    # On every multiplication int8 logs that it casts its input.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=_NOT_QUANTIZED)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=precision.language,
        llm_int8_skip_modules=_NOT_QUANTIZED,
    )


def load_tokenizer(checkpoint: Checkpoint) -> Any:
    """The checkpoint's tokenizer; special tokens spelled out in a caller's text are plain text."""
    missing = f"checkpoint {checkpoint.name!r} has no usable tokenizer in {checkpoint.folder}"
    if not any(checkpoint.folder.glob("tokenizer*")):  # transformers would make up an empty one
        raise CheckpointError(missing)
    try:
        return AutoTokenizer.from_pretrained(checkpoint.folder, split_special_tokens=True)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{missing}: {error}") from error
