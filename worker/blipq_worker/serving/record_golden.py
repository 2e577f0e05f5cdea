"""What a model answers to the canary now, to be recorded."""

from pathlib import Path
from typing import Any

from blipq.submission import checked
from blipq_worker.serving.canary import golden_of
from blipq_worker.serving.goldens import Golden, difference, read_goldens, tolerance
from blipq_worker.serving.loader import load_models
from blipq_worker.settings import WorkerSettings


def golden_now(model: str, quantization: Any, dtype: Any) -> Golden:
    """The golden of a model as ``BLIPQ_MODELS`` names it. Raises BlipqError."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    options = checked(
        WorkerSettings,
        models={"default": model},
        quantization=quantization,
        dtype=dtype,
        canary=False,
    )
    return golden_of(load_models(options)["default"])


def change(file: Path, model: str, golden: Golden) -> str | None:
    """What differs from the model's golden in a file, or from blipq's own; None without one.

    Raises GoldenError.
    """
    known = read_goldens(file if file.exists() else None).get(model)
    if known is None:
        return None
    precisions = (known.dtype, known.quantization), (golden.dtype, golden.quantization)
    return difference(known.said, golden.said, tolerance(*precisions))
