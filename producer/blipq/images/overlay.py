"""A heat map laid over its picture. Needs Pillow."""

import io

from PIL import Image

from blipq.images.heat import OPACITY, PALETTE, Heat


def overlay(picture: Image.Image, heat: Heat, size: tuple[int, int]) -> Image.Image:
    """The picture in grey, of this size, under the colours of a map of all of it.

    In grey, as the picture's own colours would be taken for the map's.
    """
    grey = picture.convert("L").resize(size, Image.Resampling.BICUBIC).convert("RGB")
    levels = Image.frombytes("L", (heat.columns, heat.rows), heat.levels)
    colours = levels.resize(size, Image.Resampling.BICUBIC)
    colours.putpalette(PALETTE)
    return Image.blend(grey, colours.convert("RGB"), OPACITY)


def fitted(size: tuple[int, int], side: int) -> tuple[int, int]:
    """A size of the same shape whose longer side is ``side``."""
    scale = side / max(size)
    width, height = (max(1, round(each * scale)) for each in size)
    return width, height


def as_png(picture: Image.Image) -> bytes:
    """The file of a picture."""
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    return stream.getvalue()
