"""Writes a model and its processor where others may be reading the previous ones."""

import shutil
import tempfile
from copy import deepcopy
from pathlib import Path

import torch
from tools.demo_model.vocabulary import processor_of
from transformers import PreTrainedModel, PreTrainedTokenizerFast


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """The model in float16 with its processor; every file is replaced in one step."""
    folder.mkdir(parents=True, exist_ok=True)
    stored = deepcopy(model).to(torch.float16)
    stored.config.dtype = torch.float16
    with tempfile.TemporaryDirectory(dir=folder.parent) as written:
        stored.save_pretrained(written)
        processor_of(tokenizer).save_pretrained(written)
        for file in Path(written).iterdir():
            file.chmod(0o644)
            shutil.move(file, folder / file.name)
