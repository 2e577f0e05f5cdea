"""Which GPUs `blipq worker --gpus` means: of nvidia-smi's, or of those a scheduler has left."""

import os
import subprocess
from pathlib import Path

import pytest

from blipq.errors import InvalidRequest
from blipq_worker.process import gpus

LISTED = """\
GPU 0: NVIDIA A100-SXM4-40GB (UUID: GPU-11111111-aaaa-bbbb-cccc-000000000001)
Unable to determine the device handle for gpu 0000:41:00.0: GPU is lost.
GPU 2: NVIDIA A100-SXM4-40GB (UUID: GPU-11111111-aaaa-bbbb-cccc-000000000002)
  MIG 3g.20gb     Device  0: (UUID: MIG-aaaaaaaa-0001)
  MIG 3g.20gb     Device  1: (UUID: MIG-GPU-bbbbbbbb/7/0)
GPU 3: NVIDIA A100-SXM4-40GB (UUID: GPU-11111111-aaaa-bbbb-cccc-000000000003)
"""
FIRST = "GPU-11111111-aaaa-bbbb-cccc-000000000001"


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.fixture
def listing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on PATH whose nvidia-smi prints a file."""
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\ncat {tmp_path}/listed\n")
    program.chmod(0o755)
    (tmp_path / "listed").write_text(LISTED)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return tmp_path


def visible(gpus_: str) -> list[str]:
    return [given["CUDA_VISIBLE_DEVICES"] for _, given in gpus.workers_on(gpus_)]


def test_all_are_those_that_nvidia_smi_lists_and_of_a_partitioned_one_its_parts(
    listing: Path,
) -> None:
    """Indexes were counted: with the second of four lost, a worker wanted for it."""
    found = gpus.workers_on("all")
    assert [name for name, _ in found] == ["0", "MIG-aaaaaaaa-0001", "MIG-GPU-bbbbbbbb/7/0", "3"]
    assert visible("all") == [FIRST, *(name for name, _ in found[1:3]), FIRST[:-1] + "3"]


def test_indexes_are_nvidia_smis_and_a_worker_never_computes_on_the_cpu() -> None:
    """By CUDA's own order, the fastest GPU is the first."""
    for _, given in gpus.workers_on("0,2"):
        assert given["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
        assert given["BLIPQ_DEVICE"] == "cuda"
    assert visible(f"1,{FIRST},MIG-aaaaaaaa-0001") == ["1", FIRST, "MIG-aaaaaaaa-0001"]


@pytest.mark.parametrize(
    ("outside", "wanted", "given"),
    [
        ("4,5", "all", ["4", "5"]),
        ("4,5", "1,0", ["5", "4"]),
        ("4,-1,5", "all", ["4"]),
        (f"{FIRST},MIG-aaaaaaaa-0001", "all", [FIRST, "MIG-aaaaaaaa-0001"]),
        (f"{FIRST},MIG-aaaaaaaa-0001", "1", ["MIG-aaaaaaaa-0001"]),
        (f"{FIRST},MIG-aaaaaaaa-0001", FIRST, [FIRST]),
    ],
)
def test_what_a_scheduler_has_left_is_all_there_is(
    outside: str, wanted: str, given: list[str], monkeypatch: pytest.MonkeyPatch, listing: Path
) -> None:
    """Slurm sets the variable: workers took the GPUs of other people's jobs."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", outside)
    assert visible(wanted) == given
    assert all("CUDA_DEVICE_ORDER" not in each for _, each in gpus.workers_on(wanted))


@pytest.mark.parametrize(
    ("outside", "wanted", "reason"),
    [
        (None, "first", "--gpus takes 'all', or indexes"),
        (None, "0,,1", "--gpus takes 'all', or indexes"),
        (None, "1,1", "names a GPU twice"),
        ("4,5", "2", "2 is not among the GPUs of CUDA_VISIBLE_DEVICES=4,5"),
        ("4,5", FIRST, "is not among the GPUs"),
        ("", "all", "no GPU here: CUDA_VISIBLE_DEVICES is ''"),
        ("-1", "0", "no GPU here"),
    ],
)
def test_a_gpu_that_cannot_be_had_is_refused(
    outside: str | None, wanted: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if outside is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", outside)
    with pytest.raises(InvalidRequest, match=reason):
        gpus.workers_on(wanted)


def test_without_an_answer_of_nvidia_smi_one_line_says_so(
    listing: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (listing / "listed").write_text("No devices were found\n")
    with pytest.raises(InvalidRequest, match="No devices were found"):
        gpus.workers_on("all")
    monkeypatch.setenv("PATH", str(listing / "nowhere"))
    with pytest.raises(InvalidRequest, match="not on PATH"):
        gpus.workers_on("all")

    def hang(*args: object, **options: object) -> None:
        raise subprocess.TimeoutExpired("nvidia-smi", 30)

    monkeypatch.setattr(subprocess, "run", hang)
    with pytest.raises(InvalidRequest, match="does not answer: a GPU may be lost"):
        gpus.workers_on("all")
