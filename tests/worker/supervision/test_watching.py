"""When a process counts as frozen, how many fronts there are, and what they are as a whole."""

from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

from blipq_worker.fronts.status import FrontStatus
from blipq_worker.process import fleet
from blipq_worker.settings import WorkerSettings
from blipq_worker.supervision import sizing
from blipq_worker.supervision.silence import Silence
from blipq_worker.supervision.state import Whole


def test_a_sign_that_stays_the_same_is_silence() -> None:
    times = iter([0.0, 0.5, 1.0, 1.5, 2.0])
    silence = Silence(lambda: next(times))
    assert [silence.after(sign) for sign in ("a", "a", "b", "b")] == [0.0, 0.5, 0.0, 0.5]


def test_who_did_not_run_itself_blames_nobody() -> None:
    times = iter([0.0, 0.1, 600.0, 600.1])
    silence = Silence(lambda: next(times))
    silence.after("a")
    assert silence.after("a") == 1.0
    assert silence.after("a") == pytest.approx(1.1)


@pytest.mark.parametrize(
    ("device", "visible", "fronts"),
    [
        ("auto", None, 7),
        ("auto", "1", 7),
        ("auto", "", 0),
        ("auto", "-1", 0),
        ("cuda:1", "", 7),
        ("cpu", None, 0),
    ],
)
def test_a_worker_on_a_gpu_has_a_front_for_each_core_but_one(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    visible: str | None,
    fronts: int,
) -> None:
    (tmp_path / "nvidia0").touch()
    monkeypatch.setattr(fleet, "DEVICES", tmp_path)
    monkeypatch.setattr(sizing, "cores", lambda: 8)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert sizing.fronts_of(WorkerSettings(device=device)) == fronts
    assert sizing.fronts_of(WorkerSettings(device=device, fronts=3)) == 3


def test_a_machine_without_a_gpu_needs_no_fronts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fleet, "DEVICES", tmp_path)
    assert sizing.fronts_of(WorkerSettings()) == 0


@pytest.mark.parametrize(("cores", "fronts"), [(1, 1), (2, 1), (8, 7), (64, 16)])
def test_fronts_are_bounded(cores: int, fronts: int) -> None:
    assert fleet.fronts_on(cores) == fronts


def test_fronts_share_what_a_worker_has() -> None:
    whole = WorkerSettings(concurrency=32, decode_threads=4, decode_memory_bytes=900)
    share = whole.shared_by(3)
    assert (share.threads, share.decode_threads, share.decode_memory_bytes) == (11, 2, 300)


@pytest.mark.parametrize(
    ("fronts", "bound"),
    [([], False), ([True, False], False), ([True, True], True)],
    ids=["none has started", "one of two", "all"],
)
def test_a_worker_is_bound_by_decoding_where_all_of_its_fronts_are(
    fronts: list[bool], bound: bool
) -> None:
    engine = SimpleNamespace(serving=True, refusal=None)
    found = [SimpleNamespace(status=partial(_status, each)) for each in fronts]
    assert Whole(engine, found).state().decode_bound == bound  # type: ignore[arg-type]


def _status(decode_bound: bool) -> FrontStatus:
    return FrontStatus(
        pid=1,
        number=1,
        beat=0.0,
        threads=8,
        active=8,
        taking=True,
        draining=False,
        problems={},
        live={},
        decode_bound=decode_bound,
    )
