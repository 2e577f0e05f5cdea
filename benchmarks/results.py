"""Figures as JSON, each with the machine, the versions and how busy the machine was."""

import json
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from blipq_worker.bench.run import about_this_run

FOLDER = Path(__file__).parent / "results"


def measure(
    section: str,
    measured: Callable[[], dict[str, Any]],
    *,
    long: bool = False,
    command: str = "",
) -> dict[str, Any]:
    """Runs a section and keeps what it found. command: where it is not the usual one."""
    about = about_this_run()
    started = time.monotonic()
    found = measured()
    took = time.monotonic() - started
    kept = {
        "section": section,
        "command": command or f"python -m benchmarks {section}{' --long' * long}",
        **about,
        "load_average_after": os.getloadavg()[0],
        "commit": commit(FOLDER.parent),
        "took_s": round(took, 1),
        "found": found,
    }
    FOLDER.mkdir(exist_ok=True)
    text = json.dumps(_rounded(kept), indent=1)
    (FOLDER / f"{section}.json").write_text(text + "\n")
    return found


def load(section: str) -> dict[str, Any] | None:
    """What a section found last, or None."""
    path = FOLDER / f"{section}.json"
    return json.loads(path.read_text()) if path.exists() else None


def source(section: str) -> str:
    """What the kept figures of a section were measured with, and on what, in Markdown."""
    kept = load(section)
    if kept is None:
        return "These figures were not kept."
    return (
        f"`{kept['command']}` at {kept['commit']}, {kept['took_s']:.0f} s on "
        f"{kept['machine']}, torch {kept['versions']['torch']}; load average "
        f"{kept['load_average']:.1f} before, {kept['load_average_after']:.1f} after."
    )


def commit(folder: Path) -> str:
    """The commit that a checkout is at."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    return ran.stdout.strip()


def _rounded(value: Any) -> Any:
    """Four significant digits: more are noise."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    return [_rounded(each) for each in value] if isinstance(value, list) else value
