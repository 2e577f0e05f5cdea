"""The tutorial's commands run as they stand there, and print what it shows."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from blipq.local.stack import free_port
from blipq.local.supervisor import Service
from conftest import ROOT, wait_until

PAGE = ROOT / "docs" / "tutorial.md"
_FENCE = re.compile(r"^```(?P<language>\w+) ?(?P<role>\w*)\n(?P<text>.*?)^```$", re.M | re.S)
#: What differs from run to run: ids, keys, addresses, times and counts.
_VARIES = re.compile(r"job_[\w-]+|[0-9a-f]{12,}|vm-\w+-\w+|\d+([.,]\d+)*")


class Block(NamedTuple):
    """A block of the page. role: "install", or the terminal whose program goes on."""

    language: str
    role: str
    text: str


class Terminals:
    """A folder as a clone has it, and the programs that run in terminals of their own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._ports = {port: str(free_port()) for port in ("8321", "8000")}
        stack = " ".join(f"--{name}-port {free_port()}" for name in ("redis", "s3"))
        self._up = f"blipq up {stack} --api-port {self._ports['8321']}"
        #: Not that of the tests: the stack must be found by its file below this folder alone.
        self._home = {
            "HOME": str(folder),
            "XDG_CACHE_HOME": str(folder / ".cache"),
            "BLIPQ_STACK_FILE": str(folder / "stack.json"),
            "PATH": os.environ["PATH"],
            "OMP_NUM_THREADS": "1",
            "BLIPQ_URL": f"http://127.0.0.1:{self._ports['8321']}",  # for the examples
        }
        self._running: dict[str, Service] = {}
        for name in ("docs", "examples"):
            (folder / name).symlink_to(ROOT / name)
        (folder / ".venv").symlink_to(Path(sys.executable).parents[1])

    def run(self, text: str) -> str:
        """What a block prints to the end."""
        ran = subprocess.run(
            ["sh", "-ec", self._here(text)],
            cwd=self.folder,
            env=self._home,
            capture_output=True,
            text=True,
            timeout=150,
        )
        assert ran.returncode == 0, ran.stdout + ran.stderr
        return ran.stdout + ran.stderr

    def start(self, terminal: str, text: str) -> None:
        """A block whose last program goes on."""
        *before, last = self._here(text).splitlines()
        script = "\n".join([f"cd '{self.folder}'", *before, f"exec {last}"])
        log = self.folder / f"{terminal}.log"
        command = ["sh", "-ec", script]
        service = Service(terminal, command, env=self._home, inherits=False, log=log)
        service.start()
        self._running[terminal] = service

    def shown(self, terminal: str) -> str:
        """What a terminal's program has printed."""
        return (self.folder / f"{terminal}.log").read_text()

    def stop(self) -> None:
        """Ends all programs, the last one first."""
        for service in reversed(self._running.values()):
            service.stop(timeout=60)

    def _here(self, text: str) -> str:
        for port, ours in self._ports.items():
            text = text.replace(f":{port}", f":{ours}").replace(f".py {port}", f".py {ours}")
        is_first = "cat > settings.sh" in text
        return ("" if is_first else ". ./settings.sh\n") + text.replace("blipq up", self._up)


@pytest.fixture
def terminals(tmp_path: Path) -> Iterator[Terminals]:
    terminals = Terminals(tmp_path)
    yield terminals
    terminals.stop()


def blocks() -> list[Block]:
    return [Block(**found.groupdict()) for found in _FENCE.finditer(PAGE.read_text())]


def lacks(printed: str, expected: str) -> str | None:
    """The first line of the page that was not printed in its order; ``...`` stands for anything."""
    lines = iter(_VARIES.sub("#", line).strip() for line in printed.splitlines())
    for line in expected.splitlines():
        parts = [re.escape(part) for part in _VARIES.sub("#", line).strip().split("...")]
        pattern = re.compile(".*".join(parts))
        if not any(pattern.fullmatch(each) for each in lines):
            return line
    return None


@pytest.mark.timeout(400)
def test_each_step_of_the_tutorial_prints_what_it_shows(terminals: Terminals) -> None:
    if shutil.which("node") is None:
        assert "CI" not in os.environ, "CI needs node"
        pytest.skip("node is not installed here")
    printed, terminal = "", ""
    for block in blocks():
        if block.role == "install":
            printed, terminal = "", "install"
        elif block.language == "sh" and block.role:
            terminal = block.role
            terminals.start(terminal, block.text)
        elif block.language == "sh":
            terminal, printed = "", terminals.run(block.text)
        elif shower := block.role or terminal:
            if shower != "install":
                wait_until(
                    lambda shower=shower, text=block.text: not lacks(terminals.shown(shower), text),
                    f"{shower}: {block.text}",
                    timeout=120,
                )
        else:
            assert lacks(printed, block.text) is None, printed
