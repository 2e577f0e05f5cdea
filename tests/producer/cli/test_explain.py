"""``blipq explain`` before there is an answer, and maps as text."""

import base64
import io
import os
import struct
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from PIL import Image

from blipq import Client
from blipq.cli.explain import submitted
from blipq.cli.terminal.maps import grids
from blipq.contract import Array, TextScore
from blipq.testing import FakeBlipq
from conftest import blipq


def scored(*maps: list[list[float]], words: tuple[str, ...] = ()) -> TextScore:
    values = [each for map_ in maps for row in map_ for each in row]
    shape = len(maps), len(maps[0]), len(maps[0][0])
    data = base64.b64encode(struct.pack(f"<{len(values)}e", *values)).decode()
    map_ = Array(shape=shape, dtype="float16", data=data)
    return TextScore(text="a text", score=0.5, map=map_, words=words)


def test_a_map_is_drawn_as_large_whatever_the_model() -> None:
    for side in (1, 8, 16, 26):
        cold, hot = [0.0] * side, [1.0] * side
        lines = list(grids(scored([cold] * side, [hot] * side, words=("red",))))
        assert lines[:2] == ["", "the whole text      red"]
        assert lines[2:] == ["·" * 16 + "    " + "█" * 16] * 8


def test_a_character_has_the_mean_of_what_lies_under_it() -> None:
    half = [[1.0, 0.0] * 16] * 16
    assert list(grids(scored(half)))[2:] == ["▒" * 16] * 8
    corner = [[1.0] + [0.0] * 15] + [[0.0] * 16] * 15
    first, *others = list(grids(scored(corner)))[2:]
    assert first == "▒" + "·" * 15
    assert others == ["·" * 16] * 7


def test_long_texts_fit_into_80_columns() -> None:
    words = ("Donaudampfschifffahrt", "長い言葉はここで切れる", *("x" * 9,)) * 3
    lines = list(grids(scored(*[[[0.5]]] * 10, words=words)))
    assert len(lines) == 3 * 10
    assert max(map(len, lines)) <= 80
    assert lines[1].startswith("the whole text      Donaudampfschiff    長い言葉はここで    ")


def test_a_text_without_maps_has_no_grid() -> None:
    assert list(grids(TextScore(text="a", score=0.5))) == []


@pytest.mark.parametrize(
    ("image", "png", "why"),
    [
        ("https://example.org/a.jpg", "heat.png", "not on a URL"),
        ("photo.jpg", ".", "no name of a file"),
        ("photo.jpg", "absent/heat.png", "no folder"),
        ("absent.jpg", "heat.png", "cannot read absent.jpg"),
        ("photo.jpg", "./photo.jpg", "the picture itself"),
        ("photo.jpg", "link.png", "the picture itself"),
    ],
)
def test_what_cannot_be_drawn_is_refused_before_a_job_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, image: str, png: str, why: str
) -> None:
    (tmp_path / "photo.jpg").write_bytes(b"a picture")
    (tmp_path / "link.png").symlink_to("photo.jpg")
    monkeypatch.chdir(tmp_path)
    # Nothing answers there: whatever was sent would end with 7.
    ran = blipq("explain", image, "a cat", "--png", png, BLIPQ_REDIS_URL="redis://127.0.0.1:1/0")
    assert ran.returncode == 2, ran.stderr
    assert why in ran.stderr
    assert (tmp_path / "photo.jpg").read_bytes() == b"a picture"


def test_a_picture_from_a_pipe_is_read_once_and_drawn_on(tmp_path: Path) -> None:
    pipe, png, scene = tmp_path / "pipe.png", tmp_path / "heat.png", picture()
    os.mkfifo(pipe)
    writing = threading.Thread(target=pipe.write_bytes, args=(scene,), daemon=True)
    writing.start()
    fake = FakeBlipq()
    with Client(backend=fake) as client:
        _, draw = submitted(client, str(pipe), "a dog", png, {})
        assert list(fake.objects.values()) == [scene]
        found = SimpleNamespace(result=lambda timeout: SimpleNamespace(best=scored([[0.0, 1.0]])))
        draw(cast(Any, found))
    writing.join(timeout=60)
    with Image.open(png) as drawn:
        assert drawn.size == (1024, 768)
    assert {path.name for path in tmp_path.iterdir()} == {"pipe.png", "heat.png"}


def picture() -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (64, 48), "gray").save(stream, "PNG")
    return stream.getvalue()
