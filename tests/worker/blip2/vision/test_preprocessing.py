"""Pixels: Pillow's resize, the model's size, and one tensor where one is enough."""

import io
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from blipq.images.decoding import decoded, opened, reduce
from blipq_worker.blip2 import Blip2, GenerateItem
from blipq_worker.blip2.loading.checkpoints import open_checkpoint
from blipq_worker.blip2.vision.preprocessing import Preprocessor, normalized
from blipq_worker.catalog.resize import resized
from blipq_worker.demo.world import is_true, render, scene
from blipq_worker.inference.requests import GenerationParams
from worker.tiny_models import save_itm

MEAN = (0.48145466, 0.4578275, 0.40821073)
DEVIATION = (0.26862954, 0.26130258, 0.27577711)


def seen(preprocessor: Preprocessor, picture: Image.Image) -> torch.Tensor:
    """What the vision tower is shown of a picture, (3, S, S)."""
    side = preprocessor.recipe.side
    pixels = torch.frombuffer(bytearray(resized(picture, preprocessor.recipe)), dtype=torch.uint8)
    return normalized(pixels.view(1, side, side, 3), preprocessor.table)[0]


def test_pixels_are_pillows_bicubic_squash_normalized(
    opt: Blip2, checkpoints: dict[str, Path], pictures: list[Image.Image]
) -> None:
    small = pictures[0].resize((28, 28), Image.Resampling.BICUBIC)
    pixels = opt.preprocess(pictures[0]).generation
    assert (pixels.dtype, pixels.shape) == (torch.uint8, (28, 28, 3))
    assert bytes(pixels.flatten().tolist()) == small.tobytes()
    values = pixels.permute(2, 0, 1) / 255
    mean, deviation = (torch.tensor(three).reshape(3, 1, 1) for three in (MEAN, DEVIATION))
    found = seen(Preprocessor(open_checkpoint(str(checkpoints["opt"]))), pictures[0])
    torch.testing.assert_close(found, (values - mean) / deviation, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.5, 0.6, 0.7]},
        {"do_normalize": False},
        {"rescale_factor": 1 / 127.5},
        {"resample": 2},
    ],
    ids=str,
)
def test_pixels_are_those_of_the_image_processor_bit_by_bit(
    checkpoints: dict[str, Path],
    tmp_path: Path,
    pictures: list[Image.Image],
    settings: dict[str, Any],
    dtype: torch.dtype,
) -> None:
    """Real pictures, and noise in which each channel has each value."""
    folder = Path(shutil.copytree(checkpoints["opt"], tmp_path / "changed"))
    file = folder / "processor_config.json"
    config = json.loads(file.read_text())
    config["image_processor"].update(settings)
    file.write_text(json.dumps(config))
    preprocessor = Preprocessor(open_checkpoint(str(folder)))
    assert preprocessor.backend.backend == "pil"
    noise = np.random.default_rng(7).integers(256, size=(90, 70, 3), dtype=np.uint8)
    every = np.arange(28 * 28 * 3).reshape(3, 28, 28).transpose(1, 2, 0) % 256
    made = [Image.fromarray(noise), Image.fromarray(every.astype(np.uint8))]
    for picture in [*pictures, *made, pictures[0].convert("L")]:
        expected = preprocessor.backend(picture.convert("RGB"), return_tensors="pt")["pixel_values"]
        assert torch.equal(seen(preprocessor, picture).to(dtype), expected[0].to(dtype))


def test_many_threads_may_preprocess_at_once(opt: Blip2, pictures: list[Image.Image]) -> None:
    expected = [opt.preprocess(picture).generation for picture in pictures]
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(opt.preprocess, pictures * 8))
    assert all(
        torch.equal(pixels.generation, expected[index % len(pictures)])
        for index, pixels in enumerate(found)
    )


def test_checkpoints_that_preprocess_alike_share_the_tensor(
    opt: Blip2, pictures: list[Image.Image]
) -> None:
    pixels = opt.preprocess(pictures[0])
    assert pixels.retrieval is pixels.generation


def test_a_retrieval_checkpoint_of_another_size_has_its_own_tensor(
    checkpoints: dict[str, Path], tmp_path: Path, pictures: list[Image.Image]
) -> None:
    model = Blip2.load(str(checkpoints["opt"]), str(save_itm(tmp_path, side=42)), dtype="float32")
    pixels = model.preprocess(pictures[0])
    assert pixels.retrieval is not None
    assert (pixels.generation.shape[0], pixels.retrieval.shape[0]) == (28, 42)


def test_without_a_retrieval_checkpoint_there_are_no_pixels_for_it(
    t5: Blip2, pictures: list[Image.Image]
) -> None:
    assert t5.preprocess(pictures[0]).retrieval is None


@pytest.mark.parametrize("size", [{"height": 224, "width": 224}, {"shortest_edge": 224}, 384])
def test_the_models_size_wins_over_a_preprocessor_config(
    checkpoints: dict[str, Path], tmp_path: Path, pictures: list[Image.Image], size: object
) -> None:
    folder = Path(shutil.copytree(checkpoints["opt"], tmp_path / "older"))
    (folder / "processor_config.json").unlink()
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"image_processor_type": "BlipImageProcessor", "size": size})
    )
    preprocessor = Preprocessor(open_checkpoint(str(folder)))
    assert preprocessor.recipe.side == 28
    assert seen(preprocessor, pictures[0]).shape == (3, 28, 28)


def test_photos_decoded_at_a_part_of_their_size_are_another_recipe(
    checkpoints: dict[str, Path],
) -> None:
    """By its version features are kept: those of one are never taken for those of the other."""
    checkpoint = open_checkpoint(str(checkpoints["opt"]))
    whole, part = (Preprocessor(checkpoint, draft=draft).recipe for draft in (False, True))
    assert (whole.draft, part.draft) == (False, True)
    assert whole.version != part.version


def test_the_demo_model_says_the_same_of_photos_decoded_at_a_part_of_their_size(
    demo: Blip2,
) -> None:
    for seed in range(90_000, 90_004):
        shown = scene(seed)
        data = io.BytesIO()
        large = render(shown).resize((2400, 1800), Image.Resampling.BICUBIC)
        large.save(data, "JPEG", quality=90)
        said = []
        for draft in (False, True):
            photo = opened(data.getvalue())
            if draft:
                reduce(photo, 2 * demo.info.recipe.side)
                assert photo.size == (300, 225)
            pixels = demo.preprocess(decoded(photo))
            (((text,),),) = demo.generate([GenerateItem(pixels, ("",), GenerationParams())])
            said.append(text.text)
        assert said[0] == said[1]
        assert is_true(said[0], shown)
