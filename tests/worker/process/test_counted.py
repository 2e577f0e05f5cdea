"""What fronts have counted reaches the page, and nothing else that they write does."""

import struct
import subprocess
import sys
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest, multiprocess

from blipq_worker.process.counted import ROOM, counted_in, counts_in, file_of

#: Counts as a front does, in files of the folder and under the name that it is given.
COUNTS = """
import sys
from pathlib import Path
from blipq.contract import Kind
from blipq_worker.process.metrics import STAGES, WorkerMetrics, count_in
count_in(Path(sys.argv[1]), sys.argv[2])
took = dict.fromkeys(STAGES.values(), 1.5) | {"batch_size": 3, "tokens": 9, "gpu_ms": 1}
for kind in Kind:
    WorkerMetrics().done(kind, "succeeded", took, model='a "b"\\n', run_ms=7)
"""
JOBS = '{code="",kind="caption",model="a \\"b\\"\\n",outcome="succeeded"}'


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which two processes have counted."""
    folder = tmp_path_factory.mktemp("metrics")
    for name in ("front-1", "front-2"):
        command = [sys.executable, "-c", COUNTS, str(folder), name]
        subprocess.run(command, check=True, timeout=60)
    return folder


@pytest.fixture
def folder(counted: Path, tmp_path: Path) -> Path:
    for path in counted.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def samples(page: bytes) -> list[str]:
    return sorted(page.decode().splitlines())


def test_what_processes_count_is_added_up_as_prometheus_client_does(folder: Path) -> None:
    registry = CollectorRegistry()
    multiprocess.MultiProcessCollector(registry, path=str(folder))  # type: ignore[no-untyped-call]
    assert samples(counted_in(folder)) == samples(generate_latest(registry))
    assert f"blipq_worker_jobs_total{JOBS} 2.0" in counted_in(folder).decode()


def written(*keys: bytes, used: int | None = None, length: int | None = None) -> bytes:
    """A file of counts with these keys. length: that its keys say they have."""
    data = b""
    for key in keys:
        padded = key + b" " * (8 - (len(key) + 4) % 8)
        said = len(key) if length is None else length
        data += struct.pack("i", said) + padded + struct.pack("dd", 1.0, 0.0)
    return struct.pack("ii", 8 + len(data) if used is None else used, 0) + data


def key(family: str, name: str, labels: str = "{}", help: str = "h") -> bytes:
    return f'["{family}", "{name}", {labels}, "{help}"]'.encode()


NAME = "blipq_worker_jobs"
TOTAL = f"{NAME}_total"
HOSTILE = {
    "more in use than there is": written(used=2**31 - 1),
    "less than nothing in use": written(used=-1),
    "a length that turns a reader in circles": written(key(NAME, TOTAL), length=-24),
    "a length beyond the end": written(key(NAME, TOTAL), length=2**31 - 1),
    "an end within a length": written(used=10) + bytes(2),
    "an end within a value": written(key(NAME, TOTAL))[:-8],
    "a depth that no stack has": written(b"[" * 100_000),
    "no list": written(b"{}"),
    "bytes that are no text": written(b"\xff\xfe"),
    "half of a character": written(key(NAME, TOTAL, help="\\ud800")),
    "a line of its own": written(key(NAME, TOTAL + "\\nmine 1")),
    "a label that is a line": written(key(NAME, TOTAL, '{"a\\nb": "c"}')),
    "a metric of the main process": written(key("process_cpu_seconds", "process_cpu_seconds")),
    "a sample of another metric": written(key(NAME, "up")),
    "a bound that is no number": written(key(NAME, f"{NAME}_bucket", '{"le": "x"}')),
}


@pytest.mark.parametrize("kind", ["counter", "histogram"])
@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
def test_a_file_that_is_not_whole_is_left_out_and_no_other(
    folder: Path, kind: str, content: bytes
) -> None:
    (folder / f"{kind}_front-3.db").write_bytes(content)
    expected = samples(counted_in(folder))
    (folder / f"{kind}_front-3.db").unlink()
    assert samples(counted_in(folder)) == expected
    assert expected


def test_a_file_that_has_grown_too_large_is_left_out(folder: Path) -> None:
    path = file_of(folder, "counter", "front-1")
    with path.open("r+b") as file:
        file.truncate(5 * ROOM)
    with pytest.raises(ValueError, match="none to be read"):
        counts_in(path)
    assert f"blipq_worker_jobs_total{JOBS} 1.0" in counted_in(folder).decode()


def test_a_file_of_a_process_that_has_not_counted_yet_is_whole(tmp_path: Path) -> None:
    for content in (b"", bytes(ROOM), written()):
        (tmp_path / "counter_front-1.db").write_bytes(content)
        assert counts_in(tmp_path / "counter_front-1.db") == []
