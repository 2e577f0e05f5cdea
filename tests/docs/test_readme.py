"""The Python in the README runs as it stands there."""

import os
import re
import subprocess
import sys

import pytest

from blipq.local.stack import LocalStack
from conftest import ROOT

README = ROOT / "README.md"
_FENCE = re.compile(r"^ {0,3}```(?P<language>[^\n]*)\n(?P<code>.*?)^ {0,3}```\s*$", re.M | re.S)


def blocks() -> list[tuple[int, str, str]]:
    """Line number, language and text of every fenced block."""
    text = README.read_text()
    return [
        (text.count("\n", 0, found.start()) + 1, found["language"].strip(), found["code"])
        for found in _FENCE.finditer(text)
    ]


PYTHON = [
    pytest.param(code, id=f"line {line}")
    for line, language, code in blocks()
    if language.lower().startswith("py")
]


def test_the_readme_shows_python() -> None:
    assert PYTHON


def test_every_block_says_its_language() -> None:
    """A block of Python that does not say so would not be run."""
    unnamed = [line for line, language, code in blocks() if not language and "import " in code]
    assert unnamed == []


@pytest.mark.usefixtures("worker")
@pytest.mark.parametrize("code", PYTHON)
def test_a_python_block_of_the_readme_runs(code: str, stack: LocalStack) -> None:
    ran = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=ROOT,
        env={**os.environ, **stack.environment()},
        capture_output=True,
        text=True,
        timeout=90,
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout
