"""Heat maps as colours: what is hot is seen, on any picture and by anyone."""

import base64
import io
import math
import struct
import subprocess
import sys
from itertools import pairwise

import pytest
from PIL import Image

from blipq.contract import Array, heat_map_place, split_s3_uri
from blipq.images.heat import OPACITY, PALETTE, Heat, heat_of, png
from blipq.images.overlay import as_png, fitted, overlay

Colour = tuple[float, float, float]

#: From linear RGB to what people see whose eyes lack a kind of cones (Vienot, Brettel, Mollon 1999
#: for red and green; Brettel's projection for blue, one of its halves).
BLINDNESS = {
    "none": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    "protan": ((0.1124, 0.8876, 0), (0.1124, 0.8876, 0), (0.0040, -0.0040, 1)),
    "deutan": ((0.2928, 0.7072, 0), (0.2928, 0.7072, 0), (-0.0223, 0.0223, 1)),
    "tritan": ((1.0, 0.1446, -0.1446), (0, 0.8592, 0.1408), (0, 0.8592, 0.1408)),
}


def array(values: list[float], *shape: int, dtype: str = "float16") -> Array:
    code = "e" if dtype == "float16" else "f"
    data = base64.b64encode(struct.pack(f"<{len(values)}{code}", *values)).decode()
    return Array.model_validate({"shape": shape, "dtype": dtype, "data": data})


def linear(part: float) -> float:
    share = part / 255
    return share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4


def luminance(colour: Colour, blindness: str) -> float:
    seen = [linear(part) for part in colour]
    red, green, blue = (
        max(0.0, sum(a * b for a, b in zip(row, seen, strict=True))) for row in BLINDNESS[blindness]
    )
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def shown(level: int, grey: int) -> Colour:
    """A level over a grey pixel of a picture."""
    red, green, blue = (
        (1 - OPACITY) * grey + OPACITY * part for part in PALETTE[3 * level : 3 * level + 3]
    )
    return red, green, blue


@pytest.mark.parametrize("blindness", BLINDNESS)
@pytest.mark.parametrize("grey", [0, 64, 128, 192, 255])
def test_hotter_is_lighter_on_every_picture_and_for_every_eye(blindness: str, grey: int) -> None:
    seen = [luminance(shown(level, grey), blindness) for level in range(256)]
    assert all(hotter > colder for colder, hotter in pairwise(seen[::8]))
    # As of text and its ground in WCAG 2.2, for large text and graphics.
    assert (seen[-1] + 0.05) / (seen[0] + 0.05) >= 3


def test_one_of_several_maps_is_read_row_by_row() -> None:
    maps = array([0, 0.5, 1, 0.25, 0, 0, *[1] * 6], 2, 2, 3)
    assert heat_of(maps) == Heat(3, 2, bytes([0, 128, 255, 64, 0, 0]))
    assert heat_of(maps, 1).levels == bytes([255] * 6)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_what_is_no_number_or_beyond_the_scale_has_a_colour_all_the_same(dtype: str) -> None:
    found = heat_of(array([math.nan, -1, math.inf, 2], 1, 2, 2, dtype=dtype))
    assert found.levels == bytes([0, 0, 255, 255])


@pytest.mark.parametrize(
    ("map_", "number"),
    [
        (array([1, 1], 1, 2), 0),
        (array([1, 1], 1, 1, 2), 1),
        (array([1, 1], 1, 1, 2), -1),
        (array([1], 1, 1, 2), 0),
        (array([], 1, 0, 0), 0),
        (array([1], 1, 1, 10**6), 0),
        (Array(shape=(1, 1, 1), dtype="float16", data="no base64"), 0),
    ],
)
def test_what_is_no_map_is_refused(map_: Array, number: int) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        heat_of(map_, number)


def test_a_page_lays_the_same_colours_over_a_picture_as_a_worker_does() -> None:
    heat = Heat(16, 16, bytes(range(256)))
    with Image.open(io.BytesIO(png(heat))) as image:
        image.load()
        assert (image.format, image.size, image.mode) == ("PNG", (16, 16), "P")
        laid = image.convert("RGBA")
    picture = Image.effect_noise((16, 16), 60)
    by_page = Image.alpha_composite(picture.convert("RGBA"), laid).convert("RGB")
    drawn = overlay(picture.convert("RGB"), heat, (16, 16))
    apart = [abs(a - b) for a, b in zip(by_page.tobytes(), drawn.tobytes(), strict=True)]
    assert max(apart) <= 2, "by rounding"


def test_a_map_covers_the_whole_picture_whatever_its_shape() -> None:
    heat = Heat(2, 1, bytes([0, 255]))
    drawn = overlay(Image.new("RGB", (40, 30), "white"), heat, fitted((40, 30), 200))
    assert drawn.size == (200, 150)
    left, right = drawn.getpixel((0, 75)), drawn.getpixel((199, 75))
    assert left == pytest.approx(shown(0, 255), abs=2)
    assert right == pytest.approx(shown(255, 255), abs=2)
    assert as_png(drawn).startswith(b"\x89PNG")


def test_the_longest_and_thinnest_pictures_keep_a_pixel() -> None:
    assert fitted((10_000, 1), 512) == (512, 1)


def test_heat_maps_lie_beside_the_output_and_no_two_outputs_share_a_name_for_theirs() -> None:
    places = [heat_map_place(f"s3://b-1/{key}") for key in ("a/1", "a/1.json", ".json")]
    assert [split_s3_uri(place) for place in places] == [
        ("b-1", "a/1.heat.png"),
        ("b-1", "a/1.json.heat.png"),
        ("b-1", ".json.heat.png"),
    ]


def test_the_door_draws_without_pillow() -> None:
    program = (
        "import sys; sys.modules['PIL'] = None; from blipq.images.heat import Heat, png;"
        "print(len(png(Heat(1, 1, bytes(1)))) > 0)"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60
    )
    assert ran.stdout == "True\n", ran.stderr
