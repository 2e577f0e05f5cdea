"""Pictures of scenes."""

import io
import math

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from blipq_worker.demo.world.scenes import Scene, Shape

_RGB = {
    "red": (215, 35, 40),
    "green": (35, 150, 55),
    "blue": (40, 75, 215),
    "yellow": (242, 218, 40),
    "purple": (140, 45, 165),
    "orange": (245, 135, 25),
    "black": (18, 18, 18),
    "white": (246, 246, 246),
    "gray": (132, 132, 132),
    "beige": (222, 204, 162),
}


def render(scene: Scene) -> Image.Image:
    """The picture of a scene: square, 64 to 224 pixels wide, with the flaws of a photograph."""
    rng = _random(scene)
    picture, _ = _drawn(scene, rng)
    return _flawed(picture, rng)


def outlines(scene: Scene) -> list[list[tuple[float, float]]]:
    """The corners of each shape as ``render`` draws them, in shares of the picture's side."""
    picture, corners = _drawn(scene, _random(scene))
    side = picture.width
    return [[(x / side, y / side) for x, y in each] for each in corners]


def _random(scene: Scene) -> np.random.Generator:
    return np.random.default_rng([scene.seed % 2**63, 1])


def _drawn(
    scene: Scene, rng: np.random.Generator
) -> tuple[Image.Image, list[list[tuple[float, float]]]]:
    """The picture without flaws, and the corners of its shapes in pixels."""
    side = int(rng.integers(64, 225))
    picture = _background(scene.background, side, rng)
    draw = ImageDraw.Draw(picture)
    corners = []
    for shape in scene.shapes:
        corners.append(_outline(shape, side, rng))
        draw.polygon(corners[-1], fill=_jittered(shape.color, rng))
    return picture, corners


def _jittered(color: str, rng: np.random.Generator) -> tuple[int, int, int]:
    red, green, blue = np.clip(np.array(_RGB[color]) + rng.integers(-14, 15, 3), 0, 255).tolist()
    return red, green, blue


def _background(color: str, side: int, rng: np.random.Generator) -> Image.Image:
    pixels = np.full((side, side, 3), _jittered(color, rng), dtype=np.float64)
    if rng.random() < 0.4:
        pixels += _gradient(side, rng)[:, :, None]
    return _picture(pixels)


def _gradient(side: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """A linear change of brightness (side, side) in a random direction."""
    angle = rng.uniform(0, 2 * math.pi)
    axis = np.linspace(-1, 1, side)
    ramp = math.cos(angle) * axis[None, :] + math.sin(angle) * axis[:, None]
    return rng.uniform(5, 16) * ramp


def _picture(pixels: NDArray[np.float64]) -> Image.Image:
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def _outline(shape: Shape, side: int, rng: np.random.Generator) -> list[tuple[float, float]]:
    """The corners of a shape in pixels, with its place, size and angle a little off."""
    center_x = 0.19 + 0.31 * shape.column + rng.uniform(-0.03, 0.03)
    center_y = 0.19 + 0.31 * shape.row + rng.uniform(-0.03, 0.03)
    radius = rng.uniform(0.135, 0.16)
    turn = rng.uniform(-0.12, 0.12)
    return [
        (
            side * (center_x + radius * distance * math.sin(angle + turn)),
            side * (center_y - radius * distance * math.cos(angle + turn)),
        )
        for angle, distance in _CORNERS[shape.kind]
    ]


def _regular(
    corners: int, first: float = 0.0, inner: float | None = None
) -> list[tuple[float, float]]:
    """Corners (angle from the top, distance from the centre), every second one at `inner`."""
    return [
        (first + 2 * math.pi * i / corners, inner if inner is not None and i % 2 else 1.0)
        for i in range(corners)
    ]


def _cross() -> list[tuple[float, float]]:
    """Twelve corners of a plus sign, clockwise from the top."""
    arm = 0.34
    tip, notch = math.hypot(arm, 1.0), math.hypot(arm, arm)
    spread = math.atan2(arm, 1.0)
    return [
        corner
        for quarter in (i * math.pi / 2 for i in range(4))
        for corner in (
            (quarter - spread, tip),
            (quarter + spread, tip),
            (quarter + math.pi / 4, notch),
        )
    ]


_CORNERS = {
    "circle": [(angle, 0.95) for angle, _ in _regular(48)],
    "square": [(angle, 1.15) for angle, _ in _regular(4, math.pi / 4)],
    "triangle": [(angle, 1.1) for angle, _ in _regular(3)],
    "star": [(angle, 1.1 * distance) for angle, distance in _regular(10, inner=0.42)],
    "cross": _cross(),
}


def _flawed(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    """The picture with noise, blur and JPEG artefacts, each only sometimes."""
    if rng.random() < 0.5:
        noise = rng.normal(0, rng.uniform(2, 10), (*picture.size, 3))
        picture = _picture(np.asarray(picture, dtype=np.float64) + noise)
    if rng.random() < 0.15:
        picture = picture.filter(
            ImageFilter.GaussianBlur(picture.width * rng.uniform(0.003, 0.008))
        )
    if rng.random() < 0.4:
        stream = io.BytesIO()
        picture.save(stream, "JPEG", quality=int(rng.integers(40, 96)))
        picture = Image.open(stream).convert("RGB")
    return picture
