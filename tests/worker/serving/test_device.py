"""A device that works is chosen, or the worker does not start; with GPUs that are not here."""

import logging
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from blipq_worker.blip2.loading.precision import choose_precision
from blipq_worker.catalog.models import ModelError
from blipq_worker.process import fleet
from blipq_worker.serving import device as devices
from blipq_worker.serving.device import stay_near, usable_device
from blipq_worker.serving.loader import load_models
from blipq_worker.settings import WorkerSettings

ARCHES = ["sm_75", "sm_80", "sm_90a", "sm_100", "compute_100"]


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    # Set first, so that it is as before in the end.
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "")
    monkeypatch.delenv("CUDA_DEVICE_ORDER")
    monkeypatch.setattr(fleet, "DEVICES", tmp_path)


def lost(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, why: str) -> None:
    """The driver has a device, and CUDA does not start."""

    def fail() -> None:
        raise RuntimeError(why)

    (tmp_path / "nvidia0").touch()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", fail)


def present(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] = (9, 0), count: int = 1
) -> None:
    properties = SimpleNamespace(
        name="NVIDIA H100",
        major=capability[0],
        minor=capability[1],
        pci_domain_id=0,
        pci_bus_id=0x3B,
        pci_device_id=0,
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ARCHES)
    monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda: 13010, raising=False)


def test_without_a_gpu_auto_is_the_cpu() -> None:
    assert usable_device("auto") == usable_device("cpu") == "cpu"


def test_a_gpu_that_is_lost_is_not_replaced_by_the_cpu(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """After a GPU had fallen off the bus, its worker came back on the CPU, and took jobs."""
    why = "CUDA driver initialization failed, you might not have a CUDA gpu."
    lost(monkeypatch, tmp_path, why)
    for device in ("auto", "cuda", "cuda:0"):
        with pytest.raises(ModelError, match="CUDA driver initialization failed") as refused:
            load_models(WorkerSettings(device=device))
        assert "BLIPQ_DEVICE=cpu" in str(refused.value)
    assert usable_device("cpu") == "cpu"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert usable_device("auto") == "cpu", "its owner hides it"


def test_a_driver_that_is_too_old_is_named_in_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    why = "The NVIDIA driver on your system is too old (found version 12040). Please update\nit"
    lost(monkeypatch, tmp_path, why)
    with pytest.raises(ModelError) as refused:
        usable_device("auto")
    reason = str(refused.value)
    assert "too old (found version 12040) (torch " in reason
    assert "CUDA 13.0" in reason
    assert "\n" not in reason


def test_a_torch_without_cuda_says_that_it_leaves_a_gpu_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lost(monkeypatch, tmp_path, "Torch not compiled with CUDA enabled")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert usable_device("auto") == "cpu"
    assert "built without CUDA" in caplog.text
    with pytest.raises(ModelError, match="BLIPQ_DEVICE=cuda: torch cannot use it"):
        usable_device("cuda")


def test_a_gpu_is_named_with_its_capability_and_driver(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    present(monkeypatch, count=2)
    with caplog.at_level(logging.INFO):
        assert usable_device("auto") == "cuda"
    (line,) = caplog.messages
    assert "cuda, NVIDIA H100, compute capability 9.0, CUDA" in line
    assert "driver's CUDA 13.1" in line
    assert usable_device("cuda:1") == "cuda:1"
    with pytest.raises(ModelError, match="BLIPQ_DEVICE=cuda:2: there are 2 GPUs"):
        usable_device("cuda:2")


@pytest.mark.parametrize("visible", [None, "1"])
def test_gpus_are_counted_as_nvidia_smi_counts_them(
    monkeypatch: pytest.MonkeyPatch, visible: str | None
) -> None:
    present(monkeypatch)
    if visible is not None:  # by whoever knows in which order
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    usable_device("auto")
    assert os.environ.get("CUDA_DEVICE_ORDER") == (None if visible else "PCI_BUS_ID")


@pytest.mark.parametrize(
    ("capability", "runs"),
    [
        ((6, 1), False),
        ((7, 0), False),
        ((7, 5), True),
        ((8, 9), True),
        ((9, 0), True),
        ((10, 3), True),
        ((12, 0), True),
    ],
)
def test_a_gpu_for_which_torch_has_no_kernels_is_refused(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], runs: bool
) -> None:
    """The first kernel would fail, in the middle of the canary."""
    present(monkeypatch, capability)
    if runs:
        assert usable_device("auto") == "cuda"
        return
    with pytest.raises(
        ModelError, match=rf"capability {capability[0]}\.{capability[1]}, and torch"
    ):
        usable_device("auto")


def test_a_build_for_one_gpu_alone_runs_on_no_other() -> None:
    assert devices._runs("sm_90a", (9, 0))
    assert not devices._runs("sm_90a", (9, 1))
    assert not devices._runs("sm_100", (9, 0))


def test_t5_needs_fp32_where_a_gpu_has_no_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda")
    for capability, language in (((8, 0), torch.bfloat16), ((7, 5), torch.float32)):
        present(monkeypatch, capability)
        assert choose_precision("auto", cuda, "t5").language == language
        assert choose_precision("auto", cuda, "opt").language == torch.float16


@pytest.mark.parametrize(
    ("near", "allowed", "stays"),
    [
        ("2-3,6", {0, 1, 2, 3}, {2, 3}),
        ("0-3", {0, 1, 2, 3}, None),  # one node
        ("8-15", {0, 1, 2, 3}, None),  # a container without them
        ("", {0, 1}, None),
    ],
)
def test_the_models_thread_stays_on_the_cores_next_to_its_gpu(
    near: str,
    allowed: set[int],
    stays: set[int] | None,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    present(monkeypatch)
    folder = tmp_path / "0000:3b:00.0"
    folder.mkdir()
    (folder / "local_cpulist").write_text(f"{near}\n")
    monkeypatch.setattr(devices, "_PCI", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: allowed)
    taken: list[Any] = []
    monkeypatch.setattr(os, "sched_setaffinity", lambda pid, cores: taken.append((pid, cores)))
    stay_near("cpu")
    stay_near("cuda")
    assert taken == ([] if stays is None else [(0, stays)])


def test_a_gpu_whose_place_is_not_known_keeps_all_cores(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    present(monkeypatch)
    monkeypatch.setattr(devices, "_PCI", tmp_path / "nowhere")
    before = os.sched_getaffinity(0)
    stay_near("cuda:0")
    assert os.sched_getaffinity(0) == before
