"""Whether answers on the card are right: against a CPU in fp32, and by the canary."""

import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image, ImageDraw

from benchmarks.gpu.engine import Card, median_ms
from benchmarks.gpu.weights import T5_FOLDER, made_here, write_folder
from blipq_worker.blip2 import Blip2, GenerateItem, MatchItem
from blipq_worker.blip2.loading.precision import Dtype
from blipq_worker.blip2.loading.quantizing import Quantization
from blipq_worker.catalog.models import demo_folder
from blipq_worker.inference.requests import GenerationParams
from blipq_worker.serving import canary

PICTURES = 16
TEXTS = ("a red square", "a blue circle")
KINDS: Mapping[str, Mapping[str, Any]] = {
    "greedy": {"num_beams": 1},
    "sampled": {"num_beams": 1, "do_sample": True, "seed": 5},
    "penalties": {"num_beams": 1, "repetition_penalty": 1.3, "no_repeat_ngram_size": 3},
    "beams": {"num_beams": 5},
}


def tokens(card: Card) -> dict[str, Any]:
    """The demo model in fp32: texts on the card that equal those on a CPU, of each kind."""
    cpu, here = _demo("cpu", "float32"), _demo(card.device, "float32")
    found = {}
    for name, params in KINDS.items():
        pairs = zip(_captions(cpu, params), _captions(here, params), strict=True)
        found[name] = {"equal": sum(a == b for a, b in pairs), "of": PICTURES}
    return found


def precisions(card: Card) -> dict[str, Any]:
    """The demo model in the default precision: captions and matching scores against fp32."""
    exact, here = _demo("cpu", "float32"), _demo(card.device, "auto")
    greedy = KINDS["greedy"]
    pairs = zip(_captions(exact, greedy), _captions(here, greedy), strict=True)
    scores = zip(_matches(exact), _matches(here), strict=True)
    t5 = [Blip2.load(str(T5_FOLDER), device="cpu", dtype="float32")]
    t5.append(Blip2.load(str(T5_FOLDER), device=card.device))
    t5_pairs = zip(*(_captions(each, greedy) for each in t5), strict=True)
    return {
        "dtype": here.info.dtype,
        "captions_equal": sum(a == b for a, b in pairs),
        "t5_captions_equal": sum(a == b for a, b in t5_pairs),
        "of": PICTURES,
        "itm_max_difference": max(abs(a - b) for a, b in scores),
    }


def quantized(card: Card, how: Quantization) -> dict[str, Any]:
    """What the demo model says to the canary's pictures, quantized with its tower."""
    folder = demo_folder()
    parts = str(folder / "opt"), str(folder / "itm")
    model = Blip2.load(*parts, device=card.device, quantization=how, quantize_vision=True)
    return {"captions": list(canary.check(model).captions)}


def matching(card: Card) -> dict[str, Any]:
    """ITM at full size: pairs a second, and the default precision against fp32."""
    folders = [
        write_folder(card.folder / name, name, tiny=card.tiny)  # type: ignore[arg-type]
        for name in ("opt-2.7b", "itm")
    ]
    found: dict[str, Any] = {}
    scores = {}
    for dtype in ("float32", "auto"):
        card.clear()
        with made_here():
            model = Blip2.load(*folders, device=card.device, dtype=dtype)  # type: ignore[arg-type]
        scores[dtype] = _matches(model)
        images = 8
        pixels = [model.preprocess(each) for each in _pictures()[:images]]
        items = [MatchItem(each, TEXTS * 6, "itm") for each in pixels]
        took = median_ms(lambda m=model, i=items: m.match(i), 3, 1)  # type: ignore[misc]
        found[dtype] = {"pairs_per_s": 1000 * images * len(TEXTS) * 6 / took}
        del model
    pairs = zip(scores["float32"], scores["auto"], strict=True)
    return found | {"max_difference": max(abs(a - b) for a, b in pairs)}


_DEAD = """
import torch
device = "cuda" if torch.cuda.is_available() else "cpu"
weights = torch.ones(4, 4, device=device)
for _ in range(3):
    try:
        print(torch.nn.functional.embedding(torch.tensor([9], device=device), weights).sum().item())
    except Exception as error:
        kinds = [each.__name__ for each in type(error).__mro__ if each is not object]
        print(" < ".join(kinds[:3]), "|", str(error).splitlines()[0])
"""


def dead_context(card: Card) -> dict[str, Any]:
    """What calls raise after an illegal access on the card; in a process that ends with it."""
    ran = subprocess.run([sys.executable, "-c", _DEAD], capture_output=True, text=True, timeout=90)
    return {"said": ran.stdout.splitlines()}


def _demo(device: str, dtype: Dtype) -> Blip2:
    torch.backends.cuda.matmul.allow_tf32 = False
    folder = demo_folder()
    return Blip2.load(str(folder / "opt"), str(folder / "itm"), device=device, dtype=dtype)


def _pictures() -> list[Image.Image]:
    pictures = []
    for number in range(PICTURES):
        picture = Image.new("RGB", (128, 128), (255, 255, 255))
        color = (220 - 12 * number, 30 + 9 * number, 30 + 13 * number)
        left = 20 + 2 * number
        ImageDraw.Draw(picture).rectangle((left, 30, left + 40, 80), fill=color)
        pictures.append(picture)
    return pictures


def _captions(model: Blip2, params: Mapping[str, Any]) -> Sequence[str]:
    wanted = GenerationParams(**{"max_new_tokens": 20, **params})
    items = [GenerateItem(model.preprocess(each), ("",), wanted) for each in _pictures()]
    return [texts[0][0].text for texts in model.generate(items)]


def _matches(model: Blip2) -> list[float]:
    items = [MatchItem(model.preprocess(each), TEXTS, "itm") for each in _pictures()]
    return [score for scores in model.match(items) for score in scores]
