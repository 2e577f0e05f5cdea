"""Whichever code computes attention, the answers are the same; each where it can run."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from blipq_worker.blip2 import Blip2, GenerateItem
from blipq_worker.blip2.loading import weights as loading
from blipq_worker.blip2.loading.attention import choose_attention, matrices
from blipq_worker.blip2.loading.precision import choose_precision
from blipq_worker.catalog.params import resolve

CPU, GPU = torch.device("cpu"), torch.device("cuda")
PARTS = ("", "vision_config", "qformer_config", "text_config")
MATRICES = "blipq_matrices"


def same_answers(one: Blip2, other: Blip2, picture: Image.Image) -> None:
    ours, theirs = (m.generator.vision.patches([m.preprocess(picture)]) for m in (one, other))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    for options in ({"num_beams": 1}, {"num_beams": 3}):
        params = resolve("caption", one.info, {"max_new_tokens": 8, **options})
        items = [
            GenerateItem(one.preprocess(picture), prompts, params)
            for prompts in (("a photo of",), ("", "a photo of a dog that"))
        ]
        assert one.generate(items) == other.generate(items)


def test_eager_attention_computes_the_same(
    checkpoints: dict[str, Path], opt: Blip2, pictures: list[Image.Image]
) -> None:
    eager = Blip2.load(
        str(checkpoints["opt"]), str(checkpoints["itm"]), dtype="float32", attention="eager"
    )
    parts = eager.generator.model.config
    for part in (parts.vision_config, parts.qformer_config, parts.text_config):
        assert part._attn_implementation == "eager"
    same_answers(opt, eager, pictures[0])


def test_products_of_matrices_compute_the_same(
    checkpoints: dict[str, Path],
    opt: Blip2,
    pictures: list[Image.Image],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In fp32, where rounding hides nothing."""
    monkeypatch.setattr(loading, "choose_attention", lambda *_: dict.fromkeys(PARTS, MATRICES))
    model = Blip2.load(str(checkpoints["opt"]), dtype="float32")
    same_answers(opt, model, pictures[0])


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("length", [1, 7])
@torch.inference_mode()
def test_a_product_in_bfloat16_is_as_good_as_the_fused_kernel(length: int, masked: bool) -> None:
    query = torch.randn(3, length, 4, 16).transpose(1, 2)
    key, value = (torch.randn(5, 4, 12, 16)[:3, :, :9] for _ in range(2))
    mask = torch.zeros(3, 1, length, 9).masked_fill(torch.rand(3, 1, length, 9) > 0.7, -1e9)
    exact = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask if masked else None, scale=0.3
    )
    half = (each.bfloat16() for each in (query, key, value))
    found, _ = matrices(None, *half, mask.bfloat16() if masked else None, scaling=0.3)
    torch.testing.assert_close(found.float(), exact.transpose(1, 2), atol=4e-2, rtol=4e-2)


@pytest.mark.parametrize(("family", "language"), [("opt", MATRICES), ("t5", "sdpa")])
def test_auto_is_products_of_matrices_in_bfloat16_on_a_cpu(family: Any, language: str) -> None:
    precision = choose_precision("bfloat16", CPU, family)
    assert choose_attention("auto", family, precision, CPU) == {
        "": "sdpa",
        "vision_config": MATRICES,
        "qformer_config": "sdpa",
        "text_config": language,
    }


@pytest.mark.parametrize(("dtype", "device"), [("float32", CPU), ("auto", GPU)])
def test_auto_is_sdpa_elsewhere(dtype: Any, device: torch.device) -> None:
    precision = choose_precision(dtype, device, "opt")
    chosen = choose_attention("auto", "opt", precision, device)
    assert chosen == dict.fromkeys(PARTS, "sdpa")


@pytest.mark.parametrize(("family", "language"), [("opt", "flash_attention_2"), ("t5", "sdpa")])
def test_flash_attention_is_for_the_parts_that_can(
    monkeypatch: pytest.MonkeyPatch, family: Any, language: str
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    precision = choose_precision("auto", GPU, family)
    assert choose_attention("flash_attention_2", family, precision, GPU) == {
        "": "sdpa",
        "vision_config": "flash_attention_2",
        "qformer_config": "sdpa",
        "text_config": language,
    }


def test_flash_attention_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    half, full = (choose_precision(dtype, GPU, "opt") for dtype in ("auto", "float32"))
    for precision, device in ((half, CPU), (full, GPU)):
        with pytest.raises(ValueError, match="needs a GPU and 16 bits"):
            choose_attention("flash_attention_2", "opt", precision, device)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install flash-attn"):
        choose_attention("flash_attention_2", "opt", half, GPU)
