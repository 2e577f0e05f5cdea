"""Copies of the demo model that differ from it in one thing, and what is replayed on them."""

import io
import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from blipq.contract import CaptionRequest, ErrorCode, ImageRef, MatchRequest, VQARequest
from blipq.errors import PermanentError
from blipq.images.decoding import DEFAULT_LIMITS
from blipq_worker import demo
from blipq_worker.compare.cases import Case
from blipq_worker.compare.pictures import Pictures
from blipq_worker.compare.run import Guard
from blipq_worker.demo import world
from blipq_worker.images.fetch import Fetched
from blipq_worker.settings import WorkerSettings

OPTIONS = WorkerSettings(
    device="cpu", dtype="float32", quantization="none", canary=False, feature_cache_bytes=0
)
SCENES = [world.scene(seed) for seed in itertools.islice(world.DEMO_SEEDS, 6)]
Weights = dict[str, torch.Tensor]


class Scenes:
    """A fetcher of pictures that no store holds."""

    def fetch(self, image: ImageRef) -> Fetched:
        number = int(image.key.partition(".")[0])
        if number >= len(SCENES):
            raise PermanentError(ErrorCode.IMAGE_NOT_FOUND, f"there is no {image.uri}")
        data = io.BytesIO()
        world.render(SCENES[number]).save(data, "PNG")
        return Fetched(data.getvalue(), "", None)


def guard(folder: Path) -> Guard:
    folder.mkdir(exist_ok=True)
    return Guard(Pictures(Scenes(), DEFAULT_LIMITS, folder), OPTIONS)  # type: ignore[arg-type]


def picture(number: int) -> ImageRef:
    return ImageRef(uri=f"s3://scenes/{number}.png")


CASES = [
    Case("caption", CaptionRequest(image=picture(0))),
    Case("questions", VQARequest(image=picture(1), questions=("what color is the circle?",))),
    Case("match", MatchRequest(image=picture(2), texts=("a red circle",))),
]


def copied(folder: Path, *, config: Callable[[str], str] = str) -> str:
    """The demo model in a folder, as ``BLIPQ_MODELS`` names it; its configurations changed."""
    for source in (demo.OPT, demo.ITM):
        shutil.copytree(source, folder / source.name)
        file = folder / source.name / "config.json"
        file.write_text(config(file.read_text()))
    return f"{folder / 'opt'}+{folder / 'itm'}"


def changed(folder: Path, part: str, change: Callable[[Weights], None], note: str = "") -> str:
    """The same, with the weights of ``opt`` or ``itm`` changed, and a note in their header."""
    what = copied(folder)
    file = folder / part / "model.safetensors"
    weights = load_file(file)
    change(weights)
    save_file(weights, file, metadata={"format": "pt", "note": note})
    return what


def scaled(layer: str, by: float) -> Callable[[Weights], None]:
    """Multiplies all weights of a layer."""

    def change(weights: Weights) -> None:
        names = [name for name in weights if name.startswith(layer)]
        assert names, layer
        for name in names:
            weights[name] = weights[name] * by

    return change


def epsilon_of(part: str, value: float) -> Callable[[str], str]:
    """Sets the epsilon of the LayerNorms of a part."""

    def change(text: str) -> str:
        config = json.loads(text)
        assert config[part]["layer_norm_eps"] != value
        config[part]["layer_norm_eps"] = value
        return json.dumps(config)

    return change
