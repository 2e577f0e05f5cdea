"""Pictures of the world as tensors, rendered once and kept."""

import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tools.demo_model.architecture import IMAGE_SIDE, image_processor
from torch import Tensor

from blipq_worker.demo import world

BUILD = Path("build/demo_model")


@dataclass(frozen=True)
class Pictures:
    """Scenes with their pictures as the image processor makes them."""

    scenes: list[world.Scene]
    pixels: Tensor  # (scenes, 3, side, side), uint8, resized but not normalized

    def __len__(self) -> int:
        return len(self.scenes)

    def parts(self) -> tuple[Tensor, ...]:
        """The pixels in batches of a size that a CPU likes."""
        return self.pixels.split(50)


def pictures(seeds: Sequence[int]) -> Pictures:
    """The scenes of these seeds and their pictures, from the build folder if they are there."""
    kept = BUILD / f"pixels-{seeds[0]}-{len(seeds)}.pt"
    if kept.exists():
        pixels = torch.load(kept, mmap=True)
    else:
        pixels = _render_all(seeds)
        kept.parent.mkdir(parents=True, exist_ok=True)
        torch.save(pixels, kept)
    return Pictures([world.scene(seed) for seed in seeds], pixels)


def normalized(pixels: Tensor) -> Tensor:
    """(..., 3, side, side) uint8 to what the vision model takes."""
    processor = image_processor()
    mean = torch.tensor(processor.image_mean).view(3, 1, 1)
    deviation = torch.tensor(processor.image_std).view(3, 1, 1)
    return (pixels / 255 - mean) / deviation


def _render_all(seeds: Sequence[int]) -> Tensor:
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        return torch.from_numpy(np.stack(list(pool.map(_resized, seeds, chunksize=500))))


_resize = partial(image_processor(), do_rescale=False, do_normalize=False, return_tensors="np")


def _resized(seed: int) -> np.ndarray:
    """The picture of a seed (3, side, side), uint8, resized as the image processor does it."""
    pixels = _resize(world.render(world.scene(seed)))["pixel_values"][0]
    assert pixels.shape == (3, IMAGE_SIDE, IMAGE_SIDE)
    return np.asarray(pixels, dtype=np.uint8)
