"""A checkpoint's configuration as transformers has it: BLIP-2's or InstructBLIP's."""

import json
from pathlib import Path
from typing import Any

from transformers import Blip2Config, InstructBlipConfig

#: What is served, by ``model_type`` in config.json.
_KINDS = {"blip-2": Blip2Config, "instructblip": InstructBlipConfig}

#: The language models that are served, by their ``model_type``.
LANGUAGES = ("opt", "t5", "llama")


def read_config(folder: Path) -> Any:
    """The configuration in a folder; of another model it is transformers' guess at BLIP-2's.

    Raises what transformers raises, of many kinds, on a malformed one.
    """
    kind = json.loads((folder / "config.json").read_bytes()).get("model_type")
    return _KINDS.get(kind, Blip2Config).from_pretrained(folder)


def is_served(config: Any) -> bool:
    """Whether it is of a model that is served."""
    return config.model_type in _KINDS


def is_instructed(config: Any) -> bool:
    """Whether the Q-Former reads the prompt beside the image, as InstructBLIP's does."""
    return isinstance(config, InstructBlipConfig)
