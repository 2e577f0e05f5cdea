"""Fresh environments, and what is installed into them."""

import os
import subprocess
import sys
import venv
from collections.abc import Callable
from pathlib import Path

import pytest

from conftest import ROOT


class Environment:
    """A virtual environment of one's own, without pip: this one's installs into it."""

    def __init__(self, folder: Path) -> None:
        venv.create(folder, symlinks=True)
        self.python = folder / "bin" / "python"

    def pip(self, *arguments: str, **environment: str) -> str:
        """Runs pip on it; what it prints."""
        command = [sys.executable, "-m", "pip", "--python", str(self.python), *arguments]
        return run(command, **environment)

    def versions(self, *names: str) -> dict[str, str]:
        """The installed versions of these distributions."""
        lines = self.pip("list", "--format", "freeze").splitlines()
        found = dict(line.split("==") for line in lines)
        return {name: found[name] for name in names}


def run(command: list[str], **environment: str) -> str:
    """What a command prints; it fails with what it says."""
    ran = subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, **environment},
        timeout=300,
    )
    assert ran.returncode == 0, f"{command}:\n{ran.stdout}\n{ran.stderr}"
    return ran.stdout


@pytest.fixture
def new_environment(tmp_path: Path) -> Callable[[], Environment]:
    return lambda: Environment(tmp_path / "venv")


@pytest.fixture(scope="session")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The wheels of the distributions, by the name of their folder."""
    folder = tmp_path_factory.mktemp("wheels")
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir"]
    names = {"producer": "blipq", "api": "blipq_api", "worker": "blipq_worker"}
    names |= {"datasets": "blipq_datasets"}
    run([*build, str(folder), *(f"./{each}" for each in names)])
    return {each: next(folder.glob(f"{name}-*.whl")) for each, name in names.items()}
