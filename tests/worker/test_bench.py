"""`blipq bench`: equal work for both sides, distinct pictures, and one small run for real."""

import io
import json
from pathlib import Path

import pytest
from PIL import Image

from blipq import ImageRef
from blipq_worker.bench.__main__ import main, table
from blipq_worker.bench.pictures import SIZE, Pictures, drawn, read
from blipq_worker.bench.workloads import DEFAULT, MIXED, TEN


def test_a_workload_asks_the_same_every_time() -> None:
    images = [ImageRef(uri=f"s3://bucket/{n}.jpg") for n in range(50)]
    asked, again = list(MIXED.requests(images)), list(MIXED.requests(images))
    assert asked == again
    lengths = {request.generation.max_new_tokens for request in asked}
    assert len(lengths) > 10
    assert lengths <= set(range(5, 51))
    assert all(request.generation is None for request in DEFAULT.requests(images))
    assert {len(request.questions) for request in TEN.requests(images)} == {10}


def test_pictures_are_distinct_photos() -> None:
    pictures = Pictures(drawn(2)).take(6)
    assert len(set(pictures)) == 6
    assert {Image.open(io.BytesIO(each)).size for each in pictures} == {SIZE}
    assert all(40_000 < len(each) < 400_000 for each in pictures)


def test_photos_of_ones_own_are_read(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no picture")
    with pytest.raises(ValueError, match="no picture"):
        read(tmp_path)
    Image.new("L", (50, 40)).save(tmp_path / "a.png")
    assert [photo.mode for photo in read(tmp_path)] == ["RGB"]


def test_a_run_compares_the_service_with_the_bare_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    figures = tmp_path / "bench.json"
    options = ["--jobs", "4", "--processes", "2", "--workload", "greedy-20"]
    assert main([*options, "--json", str(figures)]) == 0
    found = json.loads(figures.read_text())
    assert found["bare"]["greedy-20"]["images_per_s"] > 0
    assert found["service"]["greedy-20"]["images_per_s"] > 0
    assert {"machine", "versions", "load_average"} <= found.keys()
    assert table(found).row_count == 1
