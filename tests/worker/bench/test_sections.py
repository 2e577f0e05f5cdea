"""``python -m benchmarks``: sections take turns, and none of them takes the others' time."""

import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from benchmarks import __main__ as command
from benchmarks.processes import end

#: A section that starts a service in a session of its own, says which, and never ends.
STUCK = """
import subprocess, sys, time
service = subprocess.Popen(["sleep", "600"], start_new_session=True)
with open(sys.argv[1], "w") as file:
    file.write(str(service.pid))
time.sleep(600)
"""

#: A section that answers its interrupt with a further service.
STUBBORN = """
import signal, subprocess, sys, time
def go_on(*_):
    service = subprocess.Popen(["sleep", "600"], start_new_session=True)
    with open(sys.argv[1], "w") as file:
        file.write(str(service.pid))
signal.signal(signal.SIGINT, go_on)
print("ready", flush=True)
while True:
    time.sleep(600)
"""
#: The command, as a shell starts what runs in the background: interrupts are ignored.
IN_THE_BACKGROUND = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
from benchmarks import __main__ as command
def run(size):
    print("ready", flush=True)
    time.sleep(600)
command.SECTIONS["steps"] = command.Section(run, 1, 1, 1)
sys.argv[1:] = ["--only", "steps"]
sys.exit(command.main())
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


def test_a_service_that_a_section_starts_while_it_ends_ends_too(tmp_path: Path) -> None:
    service = tmp_path / "service"
    section = started(STUBBORN, str(service))
    end(section, patience_s=2)
    assert section.returncode == -signal.SIGKILL
    assert not psutil.pid_exists(int(service.read_text()))


def test_a_section_hears_its_interrupt_though_the_command_runs_in_the_background() -> None:
    section = started(IN_THE_BACKGROUND)
    assert end(section) == 128 + signal.SIGINT


def started(program: str, *arguments: str) -> "subprocess.Popen[bytes]":
    """A section that is ready."""
    section = subprocess.Popen(
        [sys.executable, "-c", program, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert section.stdout is not None
    with section.stdout as lines:
        assert lines.readline() == b"ready\n"
    return section


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
