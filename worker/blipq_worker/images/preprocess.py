"""A decoded image to the bytes that are sent to a model."""

from collections.abc import Sequence

from PIL.Image import Image

from blipq_worker.catalog.resize import resized
from blipq_worker.inference.requests import Recipe


def pixels_of(image: Image, recipes: Sequence[Recipe]) -> tuple[memoryview, ...]:
    """An image resized by each of a model's recipes. Thread-safe."""
    return tuple(memoryview(resized(image, recipe)) for recipe in recipes)
