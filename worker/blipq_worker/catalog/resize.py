"""An image as a vision tower takes it, but for normalization."""

from PIL import Image

from blipq_worker.inference.requests import Recipe


def resized(image: Image.Image, recipe: Recipe) -> bytes:
    """LAVIS's ``blip_image_eval``: squashed to side x side, RGB, rows from the top.

    side x side x 3 bytes. Pillow's resize is used explicitly: it gives LAVIS's pixels bit by bit,
    torchvision's does not. Thread-safe. Source: lavis/processors/blip_processors.py.
    """
    rgb = image if image.mode == "RGB" else image.convert("RGB")
    return rgb.resize((recipe.side, recipe.side), Image.Resampling(recipe.resample)).tobytes()
