"""What stand-ins for a model say about themselves, in benchmarks and in tests, and their times."""

from collections.abc import Mapping
from typing import Any

from msgspec.structs import replace

from blipq_worker.batching.batcher import Batcher
from blipq_worker.inference.requests import ModelInfo, Reading, Recipe

#: Seconds of one H100 80GB with OPT-2.7b in fp16 (docs/gpu.md): of a look at an image, and of a
#: captured step by its slots.
LOOK_S = 0.0013
STEP_S: Mapping[int, float] = {32: 0.0036, 128: 0.0046}

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


class WithoutSessions(Batcher[Any, Any]):
    """A batcher for models that have no sessions: all of their texts are written in batches."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options | {"sessions": {}})


def model_info(**changes: Any) -> ModelInfo:
    """An OPT checkpoint without retrieval that sees 16 x 16 pixels; ``changes`` are its fields."""
    return replace(_INFO, **changes)
