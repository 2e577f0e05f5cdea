"""The PNG beside the output of a match that is explained: its maps over what the model saw."""

import math
from collections.abc import Sequence

from PIL import Image

from blipq.contract import Array, MatchRequest, Request
from blipq.images.heat import heat_of
from blipq.images.overlay import as_png, fitted, overlay

#: Longest side of the whole sheet, and of a text's part of it, in pixels.
SHEET, LARGEST = 1024, 512


def is_explained(request: Request) -> bool:
    """Whether the answer will have maps."""
    return isinstance(request, MatchRequest) and request.explain


def heat_map_sheet(
    maps: Sequence[Array], pixels: memoryview, side: int, size: tuple[int, int] | None
) -> bytes:
    """A PNG with the picture under the map of each text, in their order, row by row.

    maps: (1 + words, rows, columns) each. pixels: side x side x 3, the picture squashed to what the
    model sees; size: what it was before, whose shape it gets again.
    """
    seen = Image.frombytes("RGB", (side, side), pixels)
    columns = math.ceil(math.sqrt(len(maps)))
    width, height = fitted(size or seen.size, min(LARGEST, SHEET // columns))
    sheet = Image.new("RGB", (columns * width, math.ceil(len(maps) / columns) * height), "white")
    for place, map_ in enumerate(maps):
        drawn = overlay(seen, heat_of(map_), (width, height))
        sheet.paste(drawn, (place % columns * width, place // columns * height))
    return as_png(sheet)
