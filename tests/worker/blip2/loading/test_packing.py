"""Linear layers in the layout of a CPU's kernels compute what they did before."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from blipq_worker.blip2 import Blip2
from blipq_worker.blip2.loading import precision
from blipq_worker.blip2.loading import weights as loading
from blipq_worker.blip2.loading.packing import PackedLinear, has_kernels, pack
from blipq_worker.serving.loader import load_models
from blipq_worker.settings import WorkerSettings

#: As oneDNN sees an AVX2-only CPU; it reads this once, so a process of its own is needed.
AVX2_ONLY = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def linears(model: torch.nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if type(module) is torch.nn.Linear}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("bias", [True, False])
@torch.inference_mode()
def test_a_packed_layer_computes_the_same(dtype: torch.dtype, bias: bool) -> None:
    layer = torch.nn.Linear(96, 77, bias=bias, dtype=dtype)
    model = torch.nn.Sequential(layer)
    pack(model)
    (packed,) = model
    assert isinstance(packed, PackedLinear) == has_kernels(dtype)
    states = torch.randn(300, 4, 96, dtype=dtype)
    for some in (states, states[:1], states[:0], states[0, 0], states[:, 1], states[::2, ::2]):
        torch.testing.assert_close(
            packed(some), layer(some), atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype]
        )
    assert packed.weight.dtype == dtype
    assert packed.weight.nbytes == layer.weight.nbytes


def test_a_loaded_model_is_packed_but_for_the_output_layer_that_is_its_input_layer(
    checkpoints: dict[str, Path],
) -> None:
    model = Blip2.load(str(checkpoints["opt"]), str(checkpoints["itm"]), dtype="float32")
    assert model.matcher is not None
    assert linears(model.generator.model) == {"language_model.lm_head"}
    assert linears(model.matcher.model) == set()


def test_quantized_layers_are_left_alone(checkpoints: dict[str, Path]) -> None:
    model = Blip2.load(str(checkpoints["opt"]), dtype="float32", quantization="nf4")
    found = {type(module).__name__ for module in model.generator.model.language_model.modules()}
    assert "Linear4bit" in found
    assert "PackedLinear" not in found


def test_a_model_for_the_compiler_is_not_packed(
    checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "compile_parts", lambda model: None)
    model = Blip2.load(str(checkpoints["opt"]), dtype="float32", compiled=True)
    assert len(linears(model.generator.model)) > 1


def test_layers_without_kernels_on_this_cpu_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    model = torch.nn.Sequential(
        torch.nn.Linear(8, 8, dtype=torch.bfloat16), torch.nn.Linear(8, 8, dtype=torch.float32)
    )
    pack(model)
    assert [type(layer) for layer in model] == [torch.nn.Linear, PackedLinear]


def test_bfloat16_is_served_on_a_cpu_without_avx512() -> None:
    """A real process whose kernels are those of AVX2: the demo model's canary passes there."""
    code = (
        "from blipq_worker.serving.loader import load_models\nfrom blipq_worker.settings import *\n"
    )
    code += "print(load_models(WorkerSettings(dtype='bfloat16'))['default'].info.dtype)"
    ran = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | AVX2_ONLY,
        capture_output=True,
        text=True,
        timeout=90,
    )
    assert ran.stdout.strip() == "bfloat16", ran.stderr


def test_a_cpu_without_bfloat16_is_told_once_at_start(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(precision, "has_kernels", lambda dtype: False)
    with caplog.at_level(logging.WARNING):
        load_models(WorkerSettings(dtype="bfloat16", canary=False))
    assert "BLIPQ_DTYPE=float32 is faster here" in caplog.text


def test_a_layer_that_two_parts_share_is_packed_once() -> None:
    layer = torch.nn.Linear(8, 8)
    inside = torch.nn.Sequential(layer)
    one, other = torch.nn.Sequential(inside), torch.nn.Sequential(inside)
    pack(one)
    packed = inside[0]
    pack(other)
    assert isinstance(packed, PackedLinear)
    assert inside[0] is packed
