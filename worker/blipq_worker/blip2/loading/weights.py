"""Loads a checkpoint's weights: precision part by part, quantization, device.

LAVIS computes the vision tower in fp16, OPT in fp16, T5 in bf16, and the Q-Former, the query tokens
and the matching heads in fp32. Transformers alone keeps the Q-Former in fp32 for fp16 only, and an
ordinary cast after loading would undo even that, so the types are decided while loading.
"""

import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoTokenizer,
    BitsAndBytesConfig,
    Blip2ForConditionalGeneration,
    Blip2ForImageTextRetrieval,
    InstructBlipForConditionalGeneration,
)

from blipq_worker.blip2.loading.attention import Attention, choose_attention
from blipq_worker.blip2.loading.checkpoints import Checkpoint, CheckpointError
from blipq_worker.blip2.loading.compiling import compile_parts
from blipq_worker.blip2.loading.precision import Dtype, Precision, choose_precision
from blipq_worker.blip2.loading.quantizing import Quantizing
from blipq_worker.blip2.loading.streaming import streamed_weights
from blipq_worker.catalog.models import QFORMER_TOKENIZER
from blipq_worker.inference.requests import Family

log = logging.getLogger(__name__)


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


class _Instructed(_ByParts, InstructBlipForConditionalGeneration):  # type: ignore[misc]
    pass


class _Retrieval(_ByParts, Blip2ForImageTextRetrieval):  # type: ignore[misc]
    pass


@dataclass(frozen=True, slots=True)
class Setup:
    """How a served model's checkpoints are loaded and run. compiled: by ``torch.compile``."""

    device: torch.device
    dtype: Dtype = "auto"
    quantizing: Quantizing = field(default_factory=Quantizing)
    attention: Attention = "auto"
    compiled: bool = False

    def precision(self, family: Family) -> Precision:
        """The types for a checkpoint of this family."""
        return choose_precision(self.dtype, self.device, family)


def load_weights(checkpoint: Checkpoint, setup: Setup) -> Any:
    """The model of the checkpoint: frozen and in evaluation mode.

    Raises CheckpointError where weights are missing, rather than run on random ones, ValueError for
    a type or an attention that cannot run on the device, and for a checkpoint in S3 ModelError and
    S3ModelAway.
    """
    base = _Instructed if checkpoint.instructed else _Generation
    base = _Retrieval if checkpoint.family == "retrieval" else base
    precision = setup.precision(checkpoint.family)
    model_class: Any = type(base.__name__, (base,), {"precision": precision})
    attention = choose_attention(setup.attention, checkpoint.family, precision, setup.device)
    quantizing = _bitsandbytes(checkpoint.family, precision, setup.quantizing)
    logging.getLogger("transformers.modeling_utils").addFilter(_is_no_report)
    try:
        with _stored_weights(checkpoint) as weights:
            model, report = model_class.from_pretrained(
                None,
                config=checkpoint.config,
                state_dict=weights,
                dtype=precision.vision,
                attn_implementation=attention,
                quantization_config=quantizing,
                device_map={"": setup.device},
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are refused below, by their names
            )
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"the weights of checkpoint {checkpoint.name!r} cannot be loaded: {error}"
        ) from error
    _check_loaded(checkpoint, model, report)
    model.requires_grad_(False).eval()
    if hasattr(model, "language_model"):
        model.language_model.lm_head.register_forward_pre_hook(_contiguous)
    if setup.compiled:
        compile_parts(model)
    return model


def _is_no_report(record: logging.LogRecord) -> bool:
    """Leaves out a table of many lines: ``_check_loaded`` reports it."""
    return "LOAD REPORT" not in record.getMessage()


def _check_loaded(checkpoint: Checkpoint, model: Any, report: Mapping[str, Any]) -> None:
    """Refuses a model that would partly be random; logs what is stored and not used."""
    unexpected = _some(report["unexpected_keys"])
    if wrong := sorted({*report["mismatched_keys"], *_misshapen(model)}):
        name, stored, expected = wrong[0]
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise CheckpointError(
            f"checkpoint {checkpoint.name!r}: {name} has the shape {tuple(stored)}, and "
            f"config.json has {tuple(expected)}{more}"
        )
    if missing := _some(report["missing_keys"]):
        has = f"; it has others, such as {unexpected}" if unexpected else ""
        raise CheckpointError(
            f"checkpoint {checkpoint.name!r} lacks weights, such as {missing}{has}"
        )
    if unexpected:
        log.warning(
            "checkpoint %r has %d weights that no part of the model takes, such as %s",
            checkpoint.name,
            len(report["unexpected_keys"]),
            unexpected,
        )


def _misshapen(model: Any) -> Iterator[tuple[str, tuple[int, ...], tuple[int, ...]]]:
    """Quantized weights, which transformers does not compare: name, shape, shape of the layer."""
    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear) and not layer.weight.is_floating_point():
            shape = tuple(getattr(layer.weight, "quant_state", layer.weight).shape)
            expected = layer.out_features, layer.in_features
            if shape != expected:
                yield f"{name}.weight", shape, expected


def _some(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)[:3])


def _contiguous(head: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """What an output layer is given, in one piece.

    A prompt's last states are a slice of all of them, and for a slice of several rows torch copies
    the layer's weights once for each on a CPU: 1.2 GiB for five beams of OPT-2.7b.
    """
    return args[0].contiguous(), *args[1:]


def _stored_weights(checkpoint: Checkpoint) -> AbstractContextManager[Mapping[str, Any]]:
    """The checkpoint's tensors by name, each read on request and not kept.

    Transformers itself maps the files into memory, and what it has read of them stays resident
    until all is loaded: for nf4 that is four times what the model takes.
    """
    if checkpoint.pushed is None:
        return _local_weights(checkpoint.weights)
    files = {path.name: names for path, names in checkpoint.weights.items()}
    return streamed_weights(checkpoint.pushed, files)


@contextmanager
def _local_weights(stored: Mapping[Path, set[str] | None]) -> Iterator[dict[str, Any]]:
    with ExitStack() as files:
        weights: dict[str, Any] = {}
        for path, names in stored.items():
            file = files.enter_context(safe_open(path, framework="pt", backend="pread"))
            weights |= {name: file.get_slice(name) for name in names or file.keys()}
        yield weights


def _bitsandbytes(family: Family, precision: Precision, quantizing: Quantizing) -> Any:
    if not quantizing.applies_to(family):
        return None
    # On every multiplication int8 logs that it casts its input.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    if quantizing.method == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=quantizing.skipped)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=precision.language,
        llm_int8_skip_modules=quantizing.skipped,
    )


def load_tokenizer(checkpoint: Checkpoint) -> Any:
    """The checkpoint's tokenizer; special tokens spelled out in a caller's text are plain text."""
    return _tokenizer(checkpoint, checkpoint.folder)


def load_instruction_tokenizer(checkpoint: Checkpoint) -> Any:
    """The same of an InstructBLIP's Q-Former."""
    return _tokenizer(checkpoint, checkpoint.folder / QFORMER_TOKENIZER)


def _tokenizer(checkpoint: Checkpoint, folder: Path) -> Any:
    missing = f"checkpoint {checkpoint.name!r} has no usable tokenizer in {folder}"
    if not any(folder.glob("tokenizer*")):  # transformers would make up an empty one
        raise CheckpointError(missing)
    try:
        return AutoTokenizer.from_pretrained(folder, split_special_tokens=True)
    except Exception as error:  # tokenizers raises many kinds, plain ones among them
        raise CheckpointError(f"{missing}: {error}") from error
