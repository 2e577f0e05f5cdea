"""What stand-ins for a model say about themselves, in benchmarks and in tests."""

from typing import Any

from msgspec.structs import replace

from blipq_worker.inference.requests import ModelInfo, Reading, Recipe

_INFO = ModelInfo(
    checkpoint="stand-in",
    family="opt",
    dtype="float32",
    quantization="none",
    device="cpu",
    revision="1",
    default_prompt="",
    recipe=Recipe(16, 3, "stand-in"),
    reading=Reading("", 512),
)


def model_info(**changes: Any) -> ModelInfo:
    """An OPT checkpoint without retrieval that sees 16 x 16 pixels; ``changes`` are its fields."""
    return replace(_INFO, **changes)
