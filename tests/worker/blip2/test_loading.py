"""Precision part by part, quantization, and refusal to run on random weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from blipq_worker.blip2 import Blip2, CheckpointError, GenerateItem, MatchItem, resolve
from blipq_worker.blip2 import model as module
from blipq_worker.blip2.loading import choose_precision

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def types(model: Any, part: str) -> set[torch.dtype]:
    return {weight.dtype for name, weight in model.named_parameters() if name.startswith(part)}


def kinds(model: Any, part: str) -> set[str]:
    return {type(module).__name__ for name, module in model.named_modules() if part in name}


def answers_everything(model: Blip2, picture: Image.Image) -> None:
    pixels = model.preprocess(picture)
    params = resolve("caption", model.info, {"max_new_tokens": 3})
    (texts,) = model.generate([GenerateItem(pixels, ("", "a photo of"), params)])
    assert [len(alternatives) for alternatives in texts] == [1, 1]
    for head in ("itm", "itc"):
        ((score,),) = model.match([MatchItem(pixels, ("a cat",), head)])
        assert -1 <= score <= 1


@pytest.mark.parametrize(
    ("family", "mix"), [("opt", "float16"), ("t5", "float16/bfloat16"), ("retrieval", "float16")]
)
def test_auto_is_laviss_mix_on_a_gpu(family: Any, mix: str) -> None:
    assert str(choose_precision("auto", GPU, family)) == mix
    assert str(choose_precision("float16", GPU, family)) == mix


@pytest.mark.parametrize(
    ("capabilities", "dtype"),
    [({"avx512_bf16": True}, "bfloat16"), ({"amx_bf16": True}, "bfloat16"), ({}, "float32")],
)
def test_auto_is_bfloat16_on_cpus_that_have_it(
    monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, bool], dtype: str
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert str(choose_precision("auto", CPU, "opt")) == dtype


def test_float16_is_refused_on_a_cpu(checkpoints: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match="float16 is not for CPUs"):
        Blip2.load(str(checkpoints["opt"]), dtype="float16")


@pytest.mark.parametrize("name", ["opt", "t5"])
def test_the_q_former_and_the_heads_stay_in_fp32(
    checkpoints: dict[str, Path], pictures: list[Image.Image], name: str
) -> None:
    model = Blip2.load(str(checkpoints[name]), str(checkpoints["itm"]), dtype="bfloat16")
    answers_everything(model, pictures[0])
    assert model.matcher is not None
    for network in (model.generator.model, model.matcher.model):
        assert types(network, "vision_model") == {torch.bfloat16}
        assert types(network, "qformer") | types(network, "query_tokens") == {torch.float32}
    assert types(model.generator.model, "language_") == {torch.bfloat16}
    for part in ("itm_head", "vision_projection", "text_projection", "embeddings"):
        assert types(model.matcher.model, part) == {torch.float32}


def test_the_q_formers_weights_are_not_rounded_on_the_way(checkpoints: dict[str, Path]) -> None:
    stored = load_file(checkpoints["opt"] / "model.safetensors")
    model = Blip2.load(str(checkpoints["opt"]), dtype="bfloat16").generator.model
    assert torch.equal(model.query_tokens, stored["query_tokens"])
    key = "qformer.layernorm.bias"
    assert torch.equal(model.get_parameter(key), stored[key])


def test_a_loaded_model_is_frozen_and_in_evaluation_mode(opt: Blip2) -> None:
    assert opt.matcher is not None
    for network in (opt.generator.model, opt.matcher.model):
        assert not network.training
        assert not any(weight.requires_grad for weight in network.parameters())
        assert network.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("quantization", ["int8", "nf4"])
@pytest.mark.parametrize("name", ["opt", "t5"])
def test_quantized_checkpoints_load_and_run(
    checkpoints: dict[str, Path], pictures: list[Image.Image], name: str, quantization: Any
) -> None:
    model = Blip2.load(str(checkpoints[name]), str(checkpoints["itm"]), quantization=quantization)
    assert model.matcher is not None
    layer = {"int8": "Linear8bitLt", "nf4": "Linear4bit"}[quantization]
    assert layer in kinds(model.generator.model, "language_model")
    for network in (model.generator.model, model.matcher.model):
        for part in ("vision_model", "qformer", "projection", "itm_head", "lm_head"):
            assert layer not in kinds(network, part), part
    answers_everything(model, pictures[0])


@pytest.mark.parametrize("name", ["opt", "t5"])
def test_the_mix_of_types_for_gpus_fits_together(
    checkpoints: dict[str, Path],
    pictures: list[Image.Image],
    name: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Run on the CPU, which is as good for finding tensors of different types that meet."""
    mix = choose_precision("auto", GPU, name)
    monkeypatch.setattr(module, "choose_precision", lambda *_: mix)
    model = Blip2.load(str(checkpoints[name]), str(checkpoints["itm"]))
    assert types(model.generator.model, "language_model") == {mix.language}
    assert types(model.generator.model, "vision_model") == {torch.float16}
    answers_everything(model, pictures[0])


def test_missing_weights_are_an_error_and_not_random(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    for file in checkpoints["opt"].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    del weights["language_projection.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="such as language_projection"):
        Blip2.load(str(tmp_path), dtype="float32")


def test_damaged_weights_are_a_clear_error(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    for file in checkpoints["opt"].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes()[:4000])
    (tmp_path / "config.json").write_bytes((checkpoints["opt"] / "config.json").read_bytes())
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        Blip2.load(str(tmp_path), dtype="float32")
