"""``python -m benchmarks``: sections take turns, and none of them takes the others' time."""

import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from benchmarks import __main__ as command

#: A section that starts a service in a session of its own, says which, and never ends.
STUCK = """
import subprocess, sys, time
service = subprocess.Popen(["sleep", "600"], start_new_session=True)
with open(sys.argv[1], "w") as file:
    file.write(str(service.pid))
time.sleep(600)
"""


def test_a_section_that_outlasts_its_share_ends_whole_and_the_next_ones_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    service = tmp_path / "service"

    def start(name: str, long: bool) -> "subprocess.Popen[bytes]":
        program = {"bare": STUCK, "scale": "raise SystemExit(3)"}.get(name, "")
        return subprocess.Popen(
            [sys.executable, "-c", program, str(service)], stderr=subprocess.DEVNULL
        )

    monkeypatch.setattr(command, "_start", start)
    monkeypatch.setattr(command, "USUAL_S", 100.0)
    for name, share in (("bare", 1), ("scale", 10), ("steps", 10)):
        section = command.SECTIONS[name]._replace(share=share)
        monkeypatch.setitem(command.SECTIONS, name, section)
    assert command.measure_all(["bare", "scale", "steps"], long=False) == ["bare", "scale"]
    first, second, third = capsys.readouterr().out.splitlines()
    assert first.startswith("bare: ended after ")
    assert second == "scale: ended with code 3 and without figures"
    assert third.startswith("steps: ")
    assert third.endswith(" s")
    assert not psutil.pid_exists(int(service.read_text()))


def test_a_section_keeps_what_it_finds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []

    def run(size: int) -> dict[str, float]:
        sizes.append(size)
        return {"per_s": 12.34567}

    monkeypatch.setattr(command.results, "FOLDER", tmp_path)
    monkeypatch.setitem(command.SECTIONS, "steps", command.Section(run, 2, 9, 1))
    command.measure("steps", long=False)
    command.measure("steps", long=True)
    assert sizes == [2, 9]
    kept = command.results.load("steps")
    assert kept is not None
    assert kept["found"] == {"per_s": 12.35}
    assert kept["command"] == "python -m benchmarks steps --long"
