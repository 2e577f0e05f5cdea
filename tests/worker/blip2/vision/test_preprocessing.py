"""Pixels: Pillow's resize, the model's size, and one tensor where one is enough."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from PIL import Image

from blipq_worker.blip2 import Blip2
from blipq_worker.blip2.loading.checkpoints import open_checkpoint
from blipq_worker.blip2.vision.preprocessing import Preprocessor
from worker.tiny_models import save_itm

MEAN = (0.48145466, 0.4578275, 0.40821073)
DEVIATION = (0.26862954, 0.26130258, 0.27577711)


def test_pixels_are_pillows_bicubic_squash_normalized(
    opt: Blip2, pictures: list[Image.Image]
) -> None:
    resized = pictures[0].resize((28, 28), Image.Resampling.BICUBIC)
    values = torch.tensor(list(resized.tobytes())).reshape(28, 28, 3).permute(2, 0, 1) / 255
    mean, deviation = (torch.tensor(three).reshape(3, 1, 1) for three in (MEAN, DEVIATION))
    pixels = opt.preprocess(pictures[0]).generation
    assert (pixels.dtype, pixels.shape) == (torch.float32, (3, 28, 28))
    torch.testing.assert_close(pixels, (values - mean) / deviation, rtol=0, atol=1e-6)


def test_the_pil_backend_is_used(checkpoints: dict[str, Path], pictures: list[Image.Image]) -> None:
    preprocess = Preprocessor(open_checkpoint(str(checkpoints["opt"])))
    assert preprocess.backend.backend == "pil"
    for picture in pictures:
        expected = preprocess.backend(picture, return_tensors="pt")["pixel_values"][0]
        assert torch.equal(preprocess(picture), expected)


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
    assert (pixels.generation.shape[-1], pixels.retrieval.shape[-1]) == (28, 42)


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
    assert Preprocessor(open_checkpoint(str(folder)))(pictures[0]).shape == (3, 28, 28)
