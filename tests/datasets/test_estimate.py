"""What a dataset will take, from a sample of it; the tests play the worker."""

import json
from collections.abc import Callable
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import Result

from blipq import Client
from blipq.errors import BlipqError
from blipq.ledger.worker import WorkerLedger
from blipq.s3.refusals import S3Unavailable
from blipq_datasets import survey as surveys
from blipq_datasets.cli.figures import duration, in_bytes, lines_of, took_line
from blipq_datasets.estimate import Estimate, estimate_of
from blipq_datasets.journal import Clock, DatasetJournal
from blipq_datasets.recipe import recipe_from
from blipq_datasets.start import dataset_of
from blipq_datasets.survey import MOST_SHARDS, Survey, sample_of, survey
from blipq_datasets.uploads import Uploads

Run = Callable[..., Result]
Answering = Callable[[], Any]


def done(ran: Result, code: int = 0) -> dict[str, Any]:
    assert ran.exit_code == code, (ran.output, ran.exception)
    found: dict[str, Any] = json.loads(ran.stdout)
    return found


@pytest.fixture
def live(ledger: WorkerLedger) -> None:
    """Two workers that count as live."""
    for name in ("w1", "w2"):
        report = json.dumps({"models": ["default"]})
        ledger.register(name, ["default"], report, ttl_s=3600, spare=False)


def write(path: Path, rows: int) -> None:
    """Each tenth row has no picture, and each twentieth is the one before it again."""
    pictures = [f"picture {n - 1 if n % 20 == 7 else n}".encode() for n in range(rows)]
    images = [None if n % 10 == 3 else data for n, data in enumerate(pictures)]
    pq.write_table(pa.table({"image": pa.array(images, pa.binary())}), path)


@pytest.fixture
def kill_an_estimate(run: Run, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Makes an estimate of cars.parquet that ends behind its sample of 10 rows."""

    def killed(*_: Any) -> Any:
        raise BlipqError("killed")

    def kill() -> None:
        with monkeypatch.context() as patched:
            patched.setattr("blipq_datasets.estimate.estimate_of", killed)
            assert run("estimate", "cars.parquet", "--sample", 10).exit_code == 1

    return kill


@pytest.mark.usefixtures("live")
def test_an_estimate_says_what_is_left_and_the_run_asks_that_alone(
    run: Run, answering: Answering, uploads_left: Callable[[], list[str]], tmp_path: Path
) -> None:
    write(tmp_path / "cars.parquet", 200)
    with answering() as worker:
        found = done(run("estimate", "cars.parquet", "--sample", 40, "--json"))
        assert len(worker.runs) == 40
        assert all(each["image"]["uri"].startswith("s3://") for each in worker.runs)
        left = {path.name for path in tmp_path.iterdir()} - {"cars.parquet.bulk-lock"}
        assert left == {"cars.parquet", "cars.parquet.bulk"}
        assert uploads_left() == []
        ran = run("submit", "cars.parquet", "--output", "answers", "--json")
        assert len(worker.runs) == 200 - 20 - 10
        assert (
            len({json.dumps(each["image"]["uri"].rpartition("/")[2]) for each in worker.runs})
            == 170
        )
    summary = done(ran, 3)
    assert summary["counts"] == {"succeeded": 170, "duplicate": 10, "refused": 20}
    expected = {"rows": 200, "counted": True, "repeated": 10, "refused": 20, "jobs": 130}
    assert expected.items() <= found.items()
    assert (found["sample"], found["failed"], found["workers"]) == (40, 0, 2)
    assert (found["cache_hits"], found["gpu_s"]) == (0, pytest.approx([1.3] * 3))
    assert 0 < found["run_s"][1] <= found["run_s"][0] <= found["run_s"][2]
    stats = json.loads((tmp_path / "answers" / "_stats.json").read_text())
    assert stats["estimate"] == found
    assert {"jobs": 130, "gpu_s": 1.3, "cache_hits": 0}.items() <= stats["took"].items()
    assert summary["took"] == stats["took"]
    answers = pq.read_table(tmp_path / "answers" / "cars.parquet").to_pylist()
    assert sum(each["blipq_text"] is not None for each in answers) == 180


@pytest.mark.usefixtures("live")
def test_an_estimate_that_was_killed_is_made_anew_and_leaves_nothing(
    run: Run,
    answering: Answering,
    uploads_left: Callable[[], list[str]],
    kill_an_estimate: Callable[[], None],
    tmp_path: Path,
) -> None:
    write(tmp_path / "cars.parquet", 60)

    with answering():
        kill_an_estimate()
        assert not (tmp_path / "cars.parquet.bulk").exists()
        assert uploads_left()
        found = done(run("estimate", "cars.parquet", "--sample", 10, "--json"))
        assert found["sample"] == 10
        assert uploads_left() == []
        # A second one asks others: there is an answer to the first ones.
        again = done(run("estimate", "cars.parquet", "--sample", 10, "--json"))
    assert again["jobs"] == found["jobs"] - 10
    assert not list(tmp_path.glob(".*"))


@pytest.mark.usefixtures("live")
def test_after_an_estimate_other_questions_need_an_update(
    run: Run, answering: Answering, tmp_path: Path
) -> None:
    write(tmp_path / "cars.parquet", 30)
    with answering():
        done(run("estimate", "cars.parquet", "--sample", 10, "--json"))
        other = ("submit", "cars.parquet", "--prompt", "a car that", "--json")
        refused = run(*other)
        assert (refused.exit_code, "--update" in refused.output) == (2, True)
        counts = done(run(*other, "--update"), 3)["counts"]
    assert counts == {"succeeded": 25, "duplicate": 2, "refused": 3}
    begun = run("estimate", "cars.parquet", "--json")
    assert (begun.exit_code, "has begun" in begun.output) == (2, True)


@pytest.mark.usefixtures("live")
def test_an_estimate_refuses_what_submit_would_take_for_a_manifest(
    run: Run, answering: Answering, tmp_path: Path
) -> None:
    asked = {"custom_id": "1", "kind": "vqa", "image": "s3://photos/1.jpg", "questions": ["what?"]}
    for name in ("m.jsonl", "lines.manifest"):
        (tmp_path / name).write_text(json.dumps(asked) + "\n")
        refused = run("estimate", name, "--json")
        assert (refused.exit_code, "manifest" in refused.output) == (2, True)
        assert "--question" in refused.output
        assert not (tmp_path / f"{name}.bulk").exists()
    with answering() as worker:
        run("submit", "m.jsonl", "--json")
        assert [each["kind"] for each in worker.runs] == ["vqa"]


@pytest.mark.usefixtures("live")
def test_an_estimate_is_kept_where_s3_goes_away_before_its_pictures_are_deleted(
    run: Run,
    answering: Answering,
    uploads_left: Callable[[], list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write(tmp_path / "cars.parquet", 60)

    def away(_: Any) -> None:
        raise S3Unavailable("S3 does not answer")

    with answering():
        with monkeypatch.context() as patched:
            patched.setattr(Uploads, "sweep", away)
            done(run("estimate", "cars.parquet", "--sample", 10, "--json"))
        assert uploads_left()
        done(run("submit", "cars.parquet", "--json"), 3)
    assert uploads_left() == []


@pytest.mark.usefixtures("live")
def test_an_estimate_of_another_tenant_is_not_replaced(
    run: Run, answering: Answering, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "cars.parquet", 30)
    with answering():
        done(run("estimate", "cars.parquet", "--sample", 10, "--json"))
        before = (tmp_path / "cars.parquet.bulk").read_bytes()
        monkeypatch.setenv("BLIPQ_TENANT", "acme")
        refused = run("estimate", "cars.parquet", "--sample", 10, "--json")
    assert (refused.exit_code, "BLIPQ_TENANT" in refused.output) == (2, True)
    assert (tmp_path / "cars.parquet.bulk").read_bytes() == before


@pytest.mark.usefixtures("live")
def test_a_run_clears_what_an_estimate_that_was_killed_has_left(
    run: Run,
    answering: Answering,
    uploads_left: Callable[[], list[str]],
    kill_an_estimate: Callable[[], None],
    tmp_path: Path,
) -> None:
    write(tmp_path / "cars.parquet", 30)

    with answering():
        kill_an_estimate()
        assert uploads_left()
        done(run("submit", "cars.parquet", "--json"), 3)
    assert uploads_left() == []
    assert not list(tmp_path.glob(".*"))


def test_an_estimate_needs_a_live_worker(run: Run, tmp_path: Path) -> None:
    write(tmp_path / "cars.parquet", 10)
    refused = run("estimate", "cars.parquet", "--json")
    assert (refused.exit_code, "no live worker" in refused.output) == (2, True)
    assert not (tmp_path / "cars.parquet.bulk").exists()


@pytest.mark.parametrize("kind", ["parquet", "csv", "csv.gz"])
def test_rows_of_what_is_not_read_are_extrapolated(
    client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(surveys, "MOST_ROWS", 1600)
    source = tmp_path / "set"
    source.mkdir()
    for shard in range(3):
        uris = [f"s3://photos/{shard}-{row:06}.jpg" for row in range(2000)]
        name = source / f"{shard}.{kind}"
        if kind == "parquet":
            pq.write_table(pa.table({"url": uris}), name)
        else:
            text = "\n".join(["url", *uris]).encode()
            name.write_bytes(text if kind == "csv" else gzipped(text))
    recipe = recipe_from(None, {})
    dataset = dataset_of(str(source), recipe, client, tmp_path / "j", "1")
    found = survey(dataset, 100, lambda mark: False)
    assert not found.counted
    assert found.rows == pytest.approx(6000, rel=0.02)
    assert (found.size, set(found.chosen)) == (100, {0, 1, 2})
    assert found.jobs == found.rows
    # The sample's rows are those of the whole, and can be read on from anywhere.
    sample = sample_of(dataset, found.chosen)
    entries = list(sample.preview())
    assert len({each.custom_id for each in entries}) == 100
    assert list(sample.entries(entries[41].number, entries[41].position)) == entries[42:]


def gzipped(data: bytes) -> bytes:
    import gzip

    return gzip.compress(data)


@pytest.mark.parametrize(("parts", "counted"), [((3000, 100), False), ((1500, 100), True)])
def test_rows_of_a_gzip_of_several_parts_are_counted_where_its_end_was_read(
    client: Client,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    parts: tuple[int, ...],
    counted: bool,
) -> None:
    monkeypatch.setattr(surveys, "MOST_ROWS", 1600)
    texts = ["".join(f"s3://photos/{part}-{row:06}.jpg\n" for row in range(part)) for part in parts]
    data = b"".join(map(gzipped, (b"url\n", *(text.encode() for text in texts))))
    (tmp_path / "a.csv.gz").write_bytes(data)
    dataset = dataset_of(
        str(tmp_path / "a.csv.gz"), recipe_from(None, {}), client, tmp_path / "j", "1"
    )
    found = survey(dataset, 100, lambda mark: False)
    assert (found.counted, found.read) == (counted, 1600)


def test_shards_of_a_survey_are_spread_evenly() -> None:
    assert surveys._spread(5, MOST_SHARDS) == [0, 1, 2, 3, 4]
    found = surveys._spread(1000, MOST_SHARDS)
    assert (len(found), found[0], found[-1]) == (MOST_SHARDS, 0, 999)


def test_the_intervals_hold_what_the_sample_says() -> None:
    begin = datetime(2026, 11, 28, tzinfo=UTC)

    def ran(number: int) -> dict[str, Any]:
        end = begin + timedelta(seconds=1 + number / 10)
        return {
            "status": "succeeded" if number else "failed",
            "started_at": begin.isoformat(),
            "completed_at": end.isoformat(),
            "receipt": {"gpu_ms": 50.0 if number % 2 else 150.0, "cache_hit": number < 25},
        }

    found = Survey(rows=10_100, read=100, refused=0, chosen={0: set(range(100))})
    made = estimate_of(found, [ran(number) for number in range(100)], 2)
    middle, low, high = made.gpu_s
    assert (made.jobs, made.failed, made.cache_hits) == (10_000, 1, 0.25)
    assert middle == pytest.approx(1000)
    assert (low, high) == (pytest.approx(899.5, abs=0.5), pytest.approx(1100.5, abs=0.5))
    # 100 rows took 10.9 s, of which one second passed before the first ended.
    assert made.run_s[0] == pytest.approx(1090)
    assert made.run_s[1] < 1090 * 0.91
    assert made.run_s[2] == pytest.approx(1090 * 1.1005, rel=1e-3)
    assert estimate_of(found, [], 1).run_s == (0, 0, 0)


def test_figures_fit_a_terminal_of_80_columns() -> None:
    made = Estimate(
        *(12_345_678, False, 1_234_567, 123_456, 10**13, 10_987_655, 10_000, 123, 0.25),
        *((1.2e7, 1.1e7, 1.3e7), (3.4e6, 3.1e6, 3.6e6), 128),
    )
    lines = list(lines_of(made, "s3://photos/shards/"))
    assert [line for line in lines if len(line) > 80] == []
    assert "  GPU time       139 d (127 d to 150 d)" in lines
    assert [duration(each) for each in (0.5, 42, 3600, 12_240)] == [
        "0.5 s",
        "42 s",
        "60 min",
        "3.4 h",
    ]
    assert [in_bytes(each) for each in (12, 1234, 123_456)] == ["12 B", "1.2 kB", "123 kB"]
    took = {"s": 65.0, "jobs": 1999, "gpu_s": 30.0, "cache_hits": 3}
    assert took_line(took, None) == "took 65 s, 30 s of GPU time for 1,999 jobs, 3 cache hits"
    assert took_line(took, made.as_dict()).endswith(
        "; estimated were 36 d to 42 d, 127 d to 150 d of GPU time"
    )


def test_the_time_of_a_run_adds_up_over_its_starts(tmp_path: Path) -> None:
    facts = {"id": "bulk_1", "worked_s": 100.0}
    with closing(DatasetJournal.create(tmp_path / "j.bulk", dataset=True, **facts)) as journal:
        Clock(journal).note()
        assert journal.fact("worked_s") == 100.0  # now and then alone
        Clock(journal).note(at_once=True)
        assert 100.0 < journal.fact("worked_s") < 160.0
