"""`blipq bench`: equal work for both sides, distinct pictures, and one small run for real."""

import io
import json
from pathlib import Path

import pytest
from PIL import Image

from blipq import ImageRef
from blipq_worker.bench import bare
from blipq_worker.bench.bare import Tried, ceiling
from blipq_worker.bench.figures import table
from blipq_worker.bench.pictures import SIZE, Pictures, drawn, read
from blipq_worker.bench.rate import steady_per_s
from blipq_worker.bench.workloads import DEFAULT, MIXED, TEN
from blipq_worker.catalog.models import ModelError
from blipq_worker.cli.bench import Asked, bench


def test_a_workload_asks_the_same_every_time() -> None:
    images = [ImageRef(uri=f"s3://bucket/{n}.jpg") for n in range(50)]
    asked, again = list(MIXED.requests(images)), list(MIXED.requests(images))
    assert asked == again
    lengths = {request.generation.max_new_tokens for request in asked}
    assert len(lengths) > 10
    assert lengths <= set(range(5, 51))
    assert all(request.generation is None for request in DEFAULT.requests(images))
    assert {len(request.questions) for request in TEN.requests(images)} == {10}


def test_few_images_in_a_row_have_short_and_long_texts() -> None:
    lengths = [each.max_new_tokens for each in MIXED.generations(460) if each]
    for start in range(0, 460, 23):
        assert 25 < sum(lengths[start : start + 23]) / 23 < 30
    assert set(lengths) == set(range(5, 51))


def test_a_steady_rate_leaves_out_how_work_begins_and_ends() -> None:
    slow_start_and_end = [10.0, 11.0, *(12 + n / 4 for n in range(40)), 40.0, 60.0]
    assert steady_per_s(slow_start_and_end, held=3) == pytest.approx(4)


def test_a_steady_rate_counts_whole_batches() -> None:
    done = [float(batch) for batch in (1, 3, 5, 7) for _ in range(32)]
    assert steady_per_s(done, held=32) == pytest.approx(16)
    # So many that the last moment is in the middle of a batch: all of it was done by then.
    assert steady_per_s(done[:112], held=32) == pytest.approx(16)


def test_a_ceiling_adds_up_processes_and_takes_the_best_loop() -> None:
    one = [Tried("batches of 32", 10.0, 0.1), Tried("joining of 32", 12.0, 0.2)]
    two = [Tried("batches of 32", 10.0, 0.1), Tried("joining of 32", 7.0, 0.2)]
    found = ceiling([one, two])
    assert found["loop"] == "batches of 32"
    assert found["images_per_s"] == 20
    assert found["cpu_ms"] == pytest.approx(100)


def test_what_ends_one_bare_engine_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BLIPQ_MODELS", f"default={tmp_path / 'nothing'}")
    with pytest.raises(ModelError, match="nothing"):
        bare.main(str(tmp_path), "2", "2", "greedy-20")


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
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    bench(jobs=4, processes=2, workload=[Asked.GREEDY], as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert found["bare"]["greedy-20"]["images_per_s"] > 0
    assert found["service"]["greedy-20"]["images_per_s"] > 0
    assert {"machine", "versions", "load_average"} <= found.keys()
    assert table(found).row_count == 1
