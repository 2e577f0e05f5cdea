"""Whose fault a failure is: the job's, the model's or the device's."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from blipq.contract import ErrorCode
from blipq.errors import PermanentError
from blipq_worker.blip2 import Blip2
from blipq_worker.engine.faults import (
    IN_A_ROW,
    DeviceLost,
    Trust,
    is_device_fault,
    is_out_of_memory,
)
from blipq_worker.inference import ImagePixels
from blipq_worker.serving.loader import load_models
from blipq_worker.settings import WorkerSettings

KEY = ("default", "generate")


class AcceleratorError(RuntimeError):
    """As torch.AcceleratorError, which is made by torch alone."""


def test_torch_has_the_error_that_is_looked_for_by_its_name() -> None:
    assert torch.AcceleratorError.__name__ == AcceleratorError.__name__


@pytest.mark.parametrize(
    "error",
    [
        AcceleratorError("CUDA error: device-side assert triggered"),
        AcceleratorError("an error of another kind of accelerator"),
        RuntimeError("CUDA error: an illegal memory access was encountered\nCUDA kernel ..."),
        RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx(...)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
        RuntimeError("CUDA error: unspecified launch failure"),
        RuntimeError("HIP error: the operation cannot be performed in the present state"),
    ],
)
def test_a_fault_of_the_device_is_told(error: Exception) -> None:
    assert is_device_fault(error)
    wrapped = ValueError("a pass failed")
    wrapped.__cause__ = error
    assert is_device_fault(wrapped)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("shape '[2, 3]' is invalid for input of size 5"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"),
        AcceleratorError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("CUDA error: CUBLAS_STATUS_NOT_SUPPORTED when calling `cublasLtMatmul`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED"),
        MemoryError(),
    ],
)
def test_what_the_next_call_may_survive_is_no_fault_of_the_device(error: Exception) -> None:
    assert not is_device_fault(error)


def test_a_device_without_room_is_out_of_memory() -> None:
    for error in (
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        AcceleratorError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED"),
    ):
        assert is_out_of_memory(error)
    assert not is_out_of_memory(RuntimeError("a job about running out of memory lane"))


class Calls:
    """Who was told what; the check finds ``wrong``."""

    def __init__(self, wrong: Exception | None = None) -> None:
        self.wrong = wrong
        self.lost: list[Exception] = []
        self.checked: list[str] = []
        self.refused: list[str] = []
        self.trust = Trust(lost=self.lost.append, check=self.check, refuse=self.refused.append)

    def check(self, name: str) -> None:
        self.checked.append(name)
        if self.wrong is not None:
            raise self.wrong

    def fail(self, count: int, error: Exception | None = None, key: Any = KEY) -> None:
        for _ in range(count):
            self.trust.failed(
                key, SimpleNamespace(image=ImagePixels()), error or ValueError("broken")
            )


def test_failures_of_several_jobs_in_a_row_have_the_model_checked() -> None:
    calls = Calls()
    calls.fail(IN_A_ROW - 1)
    assert not calls.trust.doubts()
    calls.fail(1)
    assert calls.trust.doubts()
    assert calls.trust.trusts()
    assert calls.checked == ["default"]
    assert not calls.trust.doubts()


def test_an_answer_between_them_ends_the_row() -> None:
    calls = Calls()
    for _ in range(5):
        calls.fail(IN_A_ROW - 1)
        calls.trust.answered(KEY)
    assert not calls.trust.doubts()


def test_answers_of_another_model_do_not() -> None:
    calls = Calls()
    for _ in range(IN_A_ROW):
        calls.fail(1)
        calls.trust.answered(("other", "generate"))
    assert calls.trust.doubts()


@pytest.mark.parametrize(
    "error",
    [PermanentError(ErrorCode.INVALID_REQUEST, "too long"), MemoryError()],
)
def test_a_jobs_own_errors_say_nothing_of_the_model(error: Exception) -> None:
    calls = Calls()
    calls.fail(9, error)
    assert not calls.trust.doubts()


def test_one_job_that_asks_for_many_things_is_one_failure() -> None:
    calls = Calls()
    item = SimpleNamespace(image=ImagePixels())
    for _ in range(9):
        calls.trust.failed(KEY, item, ValueError("broken"))
        calls.trust.failed(KEY, None, ValueError("broken in company"))
    assert not calls.trust.doubts()


def test_a_model_that_fails_its_check_is_refused() -> None:
    calls = Calls(wrong=ValueError("it repeats itself"))
    calls.fail(IN_A_ROW)
    assert not calls.trust.trusts()
    assert calls.refused == ["model 'default' failed its check: it repeats itself"]
    assert calls.lost == []


def test_a_device_that_is_lost_while_the_model_is_checked_is_told() -> None:
    calls = Calls(wrong=RuntimeError("CUDA error: unspecified launch failure"))
    calls.fail(IN_A_ROW)
    calls.trust.trusts()
    assert len(calls.lost) == 1


def test_a_lost_device_is_told_whoever_met_it() -> None:
    calls = Calls()
    calls.trust.failed(KEY, None, RuntimeError("CUDA error: unspecified launch failure"))
    assert len(calls.lost) == 1


def test_a_device_that_is_lost_while_loading_may_be_there_at_the_next_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def lost(*args: Any, **kwargs: Any) -> Blip2:
        raise RuntimeError("CUDA error: all CUDA-capable devices are busy or unavailable")

    monkeypatch.setattr(Blip2, "load", lost)
    with pytest.raises(DeviceLost, match="the device is lost: RuntimeError: CUDA error"):
        load_models(WorkerSettings())
