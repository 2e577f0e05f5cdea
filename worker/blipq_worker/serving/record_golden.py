"""Records what a model answers to the canary."""

from pathlib import Path
from typing import Any

from blipq.submission import checked
from blipq_worker.serving.canary import golden_of
from blipq_worker.serving.goldens import write_golden
from blipq_worker.serving.loader import load_models
from blipq_worker.settings import WorkerSettings


def record(model: str, output: Path, quantization: Any, dtype: Any) -> str:
    """Writes a golden into a file, or adds it there; what the model answered, as JSON.

    Raises BlipqError.
    """
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    options = checked(
        WorkerSettings,
        models={"default": model},
        quantization=quantization,
        dtype=dtype,
        canary=False,
    )
    golden = golden_of(load_models(options)["default"])
    write_golden(output, model, golden)
    return golden.said.model_dump_json(indent=2)
