"""Figures as JSON lines, written as they are found: a run that is cut short keeps what it has."""

import json
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

Section = Callable[[], Mapping[str, Any]]


class Record:
    """Appends each section's figures to a file, with when and how long it ran."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._began = time.monotonic()

    def run(self, name: str, section: Section) -> None:
        """Runs a section; what it raises is recorded, and the next one goes on."""
        started = time.monotonic()
        try:
            line = {"found": dict(section())}
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-4:]
            line = {
                "failed": f"{type(error).__name__}: {error}"[:600],
                "where": [f"{Path(each.filename).name}:{each.lineno}" for each in where],
            }
        took = round(time.monotonic() - started, 2)
        self.write(name, {"at_s": round(started - self._began, 1), "took_s": took, **line})

    def write(self, name: str, values: Mapping[str, Any]) -> None:
        """Appends a line and prints it."""
        line = json.dumps({"section": name, **rounded(values)})
        with self._path.open("a") as file:
            file.write(line + "\n")
        print(line, flush=True)


def read(path: Path) -> dict[str, dict[str, Any]]:
    """The sections of a file by name; of two of a name the later one."""
    lines = path.read_text().splitlines() if path.exists() else []
    found = {}
    for line in map(json.loads, lines):
        found[line.pop("section")] = line
    return found


def merge(paths: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """The sections of several files."""
    return {name: line for path in paths for name, line in read(path).items()}


def rounded(value: Any) -> Any:
    """Four significant digits: more are noise."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, Mapping):
        return {key: rounded(each) for key, each in value.items()}
    return [rounded(each) for each in value] if isinstance(value, list | tuple) else value
