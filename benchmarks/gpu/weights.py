"""Random weights of full size, made where they are needed: on the device, or in a folder.

The shapes are those of the published checkpoints; processors and tokenizers are the demo model's
and the tests', so texts mean nothing and take as long as real ones.
"""

import argparse
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import torch
from safetensors.torch import save_file
from transformers import (
    AutoTokenizer,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2ForImageTextRetrieval,
)

from blipq_worker.blip2.loading import weights as loading
from blipq_worker.catalog.models import demo_folder
from blipq_worker.serving.footprint import _LANGUAGE

Name = Literal["opt-2.7b", "flan-t5-xl", "itm"]

ROOT = Path(__file__).parents[2]
T5_FOLDER = ROOT / "tests" / "models" / "t5"
#: Sizes for a dry run on a CPU.
_TINY: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
_TINY_VISION = {**_TINY, "intermediate_size": 128, "image_size": 56, "patch_size": 14}
_TINY_QFORMER = {**_TINY, "intermediate_size": 128, "encoder_hidden_size": 64}
_TINY_OPT = {**_TINY, "word_embed_proj_dim": 64, "ffn_dim": 128, "vocab_size": 2048}
_TINY_T5 = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 3, "num_decoder_layers": 3}
_TINY_T5 |= {"num_heads": 4, "vocab_size": 4096}
#: A retrieval checkpoint's language model is never asked for anything.
_UNUSED = {"model_type": "opt", **_TINY, "num_hidden_layers": 1, "vocab_size": 8, "ffn_dim": 64}
_UNUSED |= {"word_embed_proj_dim": 64}


def write_folder(folder: Path, name: Name, *, tiny: bool = False, weights: bool = False) -> str:
    """A checkpoint folder of this shape; its path. Without weights, ``made_here`` makes them."""
    source = _source(name)
    if not folder.exists():
        big = shutil.ignore_patterns("*.safetensors", "config.json")
        shutil.copytree(source, folder, ignore=big)
        config = _config(name, tiny=tiny)
        config.save_pretrained(folder)
        _set_side(folder, config.vision_config.image_size)
        stored = dict(_made(config)) if weights else {}
        save_file(stored, folder / "model.safetensors", {"format": "pt"})
    return str(folder)


@contextmanager
def made_here() -> Iterator[None]:
    """Loads checkpoints as ever, but for their weights, which are made instead of read."""

    @contextmanager
    def stored(checkpoint: Any) -> Iterator[dict[str, torch.Tensor]]:
        yield dict(_made(checkpoint.config))

    with patch.object(loading, "_stored_weights", stored):
        yield


def _source(name: Name) -> Path:
    return T5_FOLDER if name == "flan-t5-xl" else demo_folder() / {"itm": "itm"}.get(name, "opt")


def _config(name: Name, *, tiny: bool) -> Blip2Config:
    tokenizer = AutoTokenizer.from_pretrained(_source(name))
    text = dict(_UNUSED if name == "itm" else _LANGUAGE[name])
    if tiny and name != "itm":
        text |= _TINY_OPT if text["model_type"] == "opt" else _TINY_T5
    text |= _marks(name, tokenizer)
    config = Blip2Config(
        vision_config=_TINY_VISION if tiny else {},
        qformer_config=_qformer(name, tokenizer, tiny=tiny),
        text_config=text,
        num_query_tokens=32,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    retrieval = name == "itm"
    config.architectures = [_architecture(retrieval).__name__]
    return config


def _architecture(retrieval: bool) -> Any:
    return Blip2ForImageTextRetrieval if retrieval else Blip2ForConditionalGeneration


def _marks(name: Name, tokenizer: Any) -> dict[str, Any]:
    marks = {"pad_token_id": tokenizer.pad_token_id}
    if name == "flan-t5-xl":
        return marks | {"decoder_start_token_id": 0, "eos_token_id": tokenizer.eos_token_id}
    end = 2 if name == "itm" else tokenizer.convert_tokens_to_ids("Ċ")
    return marks | {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": end, "dropout": 0.0}


def _qformer(name: Name, tokenizer: Any, *, tiny: bool) -> dict[str, Any]:
    config: dict[str, Any] = dict(_TINY_QFORMER) if tiny else {}
    if name == "itm":
        words = len(tokenizer) if tiny else 30_523
        config |= {"use_qformer_text_input": True, "vocab_size": max(words, len(tokenizer))}
    return config


def _made(config: Blip2Config) -> Iterator[tuple[str, torch.Tensor]]:
    """Weights as models are initialized, in 16 bits on a GPU, with larger queries: pictures differ.

    Tied weights come once, as in the published files.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    generator = torch.Generator(device).manual_seed(11)
    with torch.device("meta"):
        shape = _architecture("Retrieval" in config.architectures[0])(config)
    for name, like in shape.named_parameters():
        weight = torch.empty(like.shape, dtype=dtype, device=device)
        if name.endswith("bias"):
            weight.zero_()
        elif "norm" in name:
            weight.fill_(1.0)
        else:
            weight.normal_(std=0.5 if name == "query_tokens" else 0.02, generator=generator)
        yield name, weight


def _set_side(folder: Path, side: int) -> None:
    """Makes the image processor's size that of the vision tower."""
    size = {"height": side, "width": side}
    for path in (folder / "processor_config.json", folder / "preprocessor_config.json"):
        if path.exists():
            config = json.loads(path.read_text())
            config.get("image_processor", config)["size"] = size
            path.write_text(json.dumps(config))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tiny", action="store_true")
    arguments = parser.parse_args()
    write_folder(arguments.folder, "opt-2.7b", tiny=arguments.tiny, weights=True)
