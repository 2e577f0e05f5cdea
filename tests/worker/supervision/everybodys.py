"""A Python that every user may run: this one may lie in a home that is closed to others."""

import os
import shlex
import shutil
import stat
import sys
import sysconfig
from pathlib import Path

CHECKOUT = Path(__file__).parents[3]
#: What the stand-ins do without.
_LEFT_OUT = shutil.ignore_patterns("site-packages", "test", "idlelib", "ensurepip", "__pycache__")


def python_for_all(folder: Path) -> str:
    """A program that runs Python with what is installed here. folder: where it may be copied to."""
    real = Path(sys.executable).resolve()
    packages = Path(sysconfig.get_path("purelib"))
    if all(_is_open(each) for each in (real, Path(sys.executable), packages, CHECKOUT)):
        return sys.executable
    home = folder / "python"
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    library = Path(sys.base_prefix, "lib")
    shutil.copytree(library / version, home / "lib" / version, ignore=_LEFT_OUT)
    for each in library.glob("libpython*.so*"):
        shutil.copy2(each, home / "lib")
    (home / "bin").mkdir()
    shutil.copy2(real, home / "bin" / version)
    paths = [_opened(CHECKOUT / part, folder) for part in ("producer", "worker", "tests")]
    environment = {
        "PYTHONHOME": home,
        "PYTHONPATH": ":".join(map(str, [*paths, _opened(packages, folder)])),
        "LD_LIBRARY_PATH": home / "lib",
    }
    said = " ".join(f"{name}={shlex.quote(str(value))}" for name, value in environment.items())
    program = folder / version
    program.write_text(f'#!/bin/sh\n{said} exec {home}/bin/{version} "$@"\n')
    program.chmod(0o755)
    return str(program)


def _is_open(path: Path) -> bool:
    """Whether everybody may pass to it."""
    folders = path.resolve().parents
    return all(each.stat().st_mode & stat.S_IXOTH for each in folders)


def _opened(path: Path, folder: Path) -> Path:
    """The folder, or where others cannot pass to it a copy: of names, if that is possible."""
    if _is_open(path):
        return path
    to = folder / "copies" / path.name
    shutil.copytree(path, to, copy_function=_linked)
    return to


def _linked(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # on another disk
        shutil.copy2(source, target)
