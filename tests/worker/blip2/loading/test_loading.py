"""Precision part by part, quantization, and refusal to run on random weights."""

import math
import shutil
import threading
import time
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from blipq_worker.blip2 import Blip2, CheckpointError, GenerateItem, MatchItem
from blipq_worker.blip2.loading import compiling, precision
from blipq_worker.blip2.loading import weights as loading
from blipq_worker.blip2.loading.compiling import (
    LONGEST_S,
    compile_parts,
    on_compiling,
    since_compiling,
)
from blipq_worker.blip2.loading.precision import choose_precision
from blipq_worker.catalog.params import resolve
from worker.tiny_models import save_t5

CPU, GPU = torch.device("cpu"), torch.device("cuda")
LAYERS = {"int8": "Linear8bitLt", "nf4": "Linear4bit"}


def types(model: Any, part: str) -> set[torch.dtype]:
    weights = chain(model.named_parameters(), model.named_buffers())  # packed ones are buffers
    return {
        weight.dtype
        for name, weight in weights
        if name.startswith(part) and weight.is_floating_point()
    }


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
    ("capabilities", "kernels", "dtype"),
    [
        ({"avx512_bf16": True}, True, "bfloat16"),
        ({"amx_bf16": True}, True, "bfloat16"),
        ({"amx_bf16": True}, False, "float32"),
        ({}, True, "float32"),
    ],
)
def test_auto_is_bfloat16_on_cpus_that_have_it(
    monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, bool], kernels: bool, dtype: str
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    monkeypatch.setattr(precision, "has_kernels", lambda dtype: kernels)
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
    layer = LAYERS[quantization]
    assert layer in kinds(model.generator.model, "language_model")
    for network in (model.generator.model, model.matcher.model):
        for part in ("vision_model", "qformer", "projection", "itm_head", "lm_head"):
            assert layer not in kinds(network, part), part
    answers_everything(model, pictures[0])


@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_the_vision_tower_is_quantized_only_if_asked(
    checkpoints: dict[str, Path], pictures: list[Image.Image], quantization: Any
) -> None:
    model = Blip2.load(
        str(checkpoints["opt"]),
        str(checkpoints["itm"]),
        quantization=quantization,
        quantize_vision=True,
    )
    assert model.matcher is not None
    for network in (model.generator.model, model.matcher.model):
        assert LAYERS[quantization] in kinds(network, "vision_model")
        for part in ("qformer", "_projection", "itm_head", "lm_head"):
            assert LAYERS[quantization] not in kinds(network, part), part
    answers_everything(model, pictures[0])
    assert model.info.quantization == f"{quantization}+vision"


def test_quantizing_the_tower_means_nothing_without_quantization(
    checkpoints: dict[str, Path],
) -> None:
    model = Blip2.load(str(checkpoints["opt"]), quantize_vision=True, dtype="float32")
    assert model.info.quantization == "none"
    assert types(model.generator.model, "vision_model") == {torch.float32}


def test_the_files_are_read_and_not_mapped(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """Pages of a mapped file count as the process' memory: four times the weights for nf4."""
    folder = str(shutil.copytree(checkpoints["opt"], tmp_path / "opt"))  # that no other test mapped
    model = Blip2.load(folder, dtype="float32")
    assert model.generator.model.query_tokens.device == CPU
    assert folder not in Path("/proc/self/maps").read_text()


def test_the_output_layer_is_not_copied_for_every_beam(
    checkpoints: dict[str, Path], pictures: list[Image.Image]
) -> None:
    """Torch does that for states that are a slice: 1.2 GiB for five beams of OPT-2.7b."""
    model = Blip2.load(str(checkpoints["opt"]), dtype="float32")
    whole: list[bool] = []
    model.generator.model.language_model.lm_head.register_forward_hook(
        lambda head, args, output: whole.append(args[0].is_contiguous())
    )
    params = resolve("caption", model.info, {"max_new_tokens": 3})
    model.generate([GenerateItem(model.preprocess(pictures[0]), ("a photo of",), params)])
    assert all(whole)
    assert whole


def test_an_output_layer_of_its_own_is_kept(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """Flan-T5's is not its input layer, though transformers calls every T5 tied."""
    folder = save_t5(tmp_path / "t5", untied=True)
    stored = load_file(folder / "model.safetensors")["language_model.lm_head.weight"]
    for quantization in ("none", "nf4"):
        model = Blip2.load(str(folder), dtype="float32", quantization=quantization)  # type: ignore[arg-type]
        network = model.generator.model.language_model
        assert torch.equal(network.lm_head.weight.to_dense(), stored)
        assert not torch.equal(network.shared.weight, stored)


@pytest.mark.parametrize("name", ["opt", "t5"])
def test_the_mix_of_types_for_gpus_fits_together(
    checkpoints: dict[str, Path],
    pictures: list[Image.Image],
    name: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Run on the CPU, which is as good for finding tensors of different types that meet."""
    mix = choose_precision("auto", GPU, name)
    monkeypatch.setattr(loading, "choose_precision", lambda *_: mix)
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


def test_compiled_parts_answer_the_same(
    checkpoints: dict[str, Path],
    opt: Blip2,
    pictures: list[Image.Image],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The tower, traced by the compiler and run without its code generator, which takes minutes."""
    monkeypatch.setattr(loading, "compile_parts", partial(compile_parts, backend="eager"))
    assert since_compiling() == math.inf
    begun: list[int] = []
    monkeypatch.setattr(compiling._Clock, "on_begin", compiling._Clock.on_begin)  # put back later
    on_compiling(lambda: begun.append(threading.get_ident()))
    model = Blip2.load(str(checkpoints["opt"]), dtype="float32", compiled=True)
    ours, theirs = (
        m.generator.vision.patches([m.preprocess(picture) for picture in pictures[:2]])
        for m in (opt, model)
    )
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert 0 < since_compiling() < 600, "the watchdog never heard of a compilation"
    assert set(begun) == {threading.get_ident()}, "told on the thread that waits for it"


def test_a_compilation_is_no_stall_until_it_takes_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling._Clock, "began", time.monotonic() - 60)
    assert since_compiling() == 0.0
    monkeypatch.setattr(compiling._Clock, "began", time.monotonic() - LONGEST_S - 200)
    assert since_compiling() >= 200
