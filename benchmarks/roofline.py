"""How near the model comes to what the device can do: bytes over bandwidth, FLOPs over peak.

On a GPU a model of full size, random weights in 16 bits, int8 and nf4; on a CPU the mid-size one.
Peaks are measured, not the maker's: reading a large tensor, and a product of large matrices.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.models import full_size, mid_size
from blipq_worker.blip2 import Blip2, Pixels
from blipq_worker.blip2.decoding import DecodeLoop, Row
from blipq_worker.blip2.loading.packing import pack
from blipq_worker.blip2.loading.quantizing import Quantization
from blipq_worker.inference.requests import GenerationParams

BATCHES = (1, 8, 32, 128) if torch.cuda.is_available() else (1, 8, 32)
#: A run of so many repeats or more takes the full-size model on a CPU, too.
LONG = 5
STEPS, PROMPT = 20, [2, 5, 6, 7]
PARAMS = GenerationParams(num_beams=1, max_new_tokens=STEPS + 2, min_new_tokens=STEPS + 2)


@dataclass(frozen=True)
class Peaks:
    """Of the device: bytes read and operations done in a second."""

    bytes_per_s: float
    flops_per_s: float

    def least_s(self, bytes: float, flops: float) -> float:
        """Seconds that this takes at least."""
        return max(bytes / self.bytes_per_s, flops / self.flops_per_s)


def roofline(repeats: int) -> dict[str, Any]:
    """By model and precision: the peaks, and passes over images and decode steps by batch size."""
    served: dict[str, tuple[str, Quantization]] = {}
    if torch.cuda.is_available():
        served |= {f"full size, {how}": (full_size(), how) for how in ("none", "int8", "nf4")}
    else:
        served["mid-size"] = mid_size().split("+")[0], "none"
        if repeats >= LONG:
            served["full size"] = full_size(), "none"
    folders = {folder for folder, _ in served.values()}
    flops = {folder: _flops(_plain(folder, "none")) for folder in folders}
    return {
        name: _of(folder, how, flops[folder], repeats) for name, (folder, how) in served.items()
    }


def _load(folder: str, quantization: Quantization, attention: Any = "auto") -> Blip2:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    options = {"quantization": quantization, "attention": attention, "device": device}
    return Blip2.load(folder, **options, slots=max(BATCHES))


def _plain(folder: str, quantization: Quantization) -> Blip2:
    """Of packed layers nothing can be counted, and of fused attention not everywhere."""
    with patch("blipq_worker.blip2.model.pack"):
        return _load(folder, quantization, "eager")


def _flops(plain: Blip2) -> dict[str, float]:
    """Of one row in each pass; neither packed nor quantized layers can be counted."""
    found = {}
    for name, run in RUNS.items():
        run_once = run(plain, 1)
        with FlopCounterMode(display=False) as counter:
            run_once()
        found[name] = float(counter.get_total_flops())
    return found


def _of(
    folder: str, quantization: Quantization, flops: dict[str, float], repeats: int
) -> dict[str, Any]:
    read = _bytes(_plain(folder, quantization))
    model = _load(folder, quantization)
    peaks = _peaks(model, repeats)
    found: dict[str, Any] = {"gb_per_s": peaks.bytes_per_s / 1e9}
    found["tflops"] = peaks.flops_per_s / 1e12
    for name, run in RUNS.items():
        found[name] = {}
        for count in BATCHES:
            took = _fastest(run(model, count), repeats)
            least = peaks.least_s(read[name], count * flops[name])
            times = {"ms": 1000 * took, "least_ms": 1000 * least, "share": least / took}
            found[name][str(count)] = times | {"per_s": count / took}
    return found


def _bytes(model: Blip2) -> dict[str, int]:
    """Of the weights that a pass reads, whatever its batch. Those of packed layers do not tell."""
    parts = model.generator.model
    read = {
        "images": [parts.vision_model, parts.qformer],
        "tokens": [parts.language_model],
    }
    return {
        name: sum(weight.nbytes for part in each for weight in part.parameters())
        for name, each in read.items()
    }


#: Makes a pass of so many rows ready, and returns it.
Run = Callable[[Blip2, int], Callable[[], object]]


def _images(model: Blip2, count: int) -> Callable[[], object]:
    side = model.info.image_size
    seen = [torch.randint(256, (side, side, 3), dtype=torch.uint8) for _ in range(count)]
    # Anew each time: pixels keep what was made of them.
    return lambda: model.generator.project([Pixels(each) for each in seen])


def _tokens(model: Blip2, count: int) -> Callable[[], object]:
    opt = model.generator.model.language_model
    embedding = opt.get_input_embeddings().weight
    queries = torch.randn(count, 32, embedding.shape[1]).to(embedding.device, embedding.dtype)
    loop = DecodeLoop(opt, ends=(), slots=count)
    rows = loop.join([Row(each, PROMPT, PARAMS) for each in queries])
    return lambda: loop.step(rows)


RUNS: dict[str, Run] = {"images": _images, "tokens": _tokens}


def _peaks(model: Blip2, repeats: int) -> Peaks:
    """In the type of the language model's layers."""
    weight = model.generator.model.language_model.get_input_embeddings().weight
    large = torch.ones(2**28 if weight.is_cuda else 2**26, device=weight.device)
    side = 8_192 if weight.is_cuda else 2_048
    product = torch.nn.Sequential(torch.nn.Linear(side, side)).to(weight.device, weight.dtype)
    rows = torch.randn(side, side).to(weight.device, weight.dtype)
    pack(product)
    with torch.inference_mode():
        read_s = _fastest(large.sum, repeats)
        product_s = _fastest(lambda: product(rows), repeats)
    return Peaks(large.nbytes / read_s, 2 * side**3 / product_s)


def _fastest(run: Callable[[], object], repeats: int) -> float:
    """Seconds; the least of so many runs, after one to warm up."""
    took = []
    for _ in range(1 + repeats):
        started = time.perf_counter()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        took.append(time.perf_counter() - started)
    return min(took[1:])
