"""Processes that are measured: how they end with all that they have started, and a worker's own."""

import signal
import subprocess
from contextlib import suppress
from typing import Any

import psutil


def end(process: "subprocess.Popen[Any]", *, patience_s: float = 30.0) -> int:
    """Ends a process and all that it has started; its exit code.

    It is interrupted first, so that it stops its services and removes its files. What is left of
    them after ``patience_s`` seconds, or would outlive it, is killed.
    """
    children = _children(process)
    process.send_signal(signal.SIGINT)
    with suppress(subprocess.TimeoutExpired):
        process.wait(patience_s)
    children |= _children(process)  # also what it has started since
    process.kill()
    for child in children:
        with suppress(psutil.NoSuchProcess):
            child.kill()
    psutil.wait_procs(children, timeout=20)
    return process.wait(20)


def _children(process: "subprocess.Popen[Any]") -> set[psutil.Process]:
    try:
        return set(psutil.Process(process.pid).children(recursive=True))
    except psutil.NoSuchProcess:
        return set()


def of_worker(pid: int | None) -> dict[str, list[psutil.Process]]:
    """A worker's processes by what they are: ``main``, and with fronts ``engine`` and ``front``."""
    main = psutil.Process(pid)
    found = {"main": [main]}
    for child in main.children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            line = child.cmdline()
            name = next((each for each in ("engine", "front") if each in line), "other")
            found.setdefault(name, []).append(child)
    return found
