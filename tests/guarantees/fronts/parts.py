"""The processes of a worker with fronts, as its host shows them."""

from contextlib import suppress
from pathlib import Path

import psutil

from blipq.local.supervisor import Service
from blipq_worker.fronts.status import read_status


def processes(worker: Service, role: str) -> list[psutil.Process]:
    """The living processes of a role (``front`` or ``engine``)."""
    found = []
    with suppress(psutil.NoSuchProcess):
        for each in psutil.Process(worker.pid).children():
            with suppress(psutil.NoSuchProcess):
                if is_alive(each) and role in each.cmdline()[1:5]:
                    found.append(each)
    return found


def is_alive(process: psutil.Process) -> bool:
    """Whether it runs, or is stopped; not whether it is a zombie."""
    with suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def run_folder(worker: Service) -> Path:
    """Where the processes of a worker meet."""
    part = (processes(worker, "engine") or processes(worker, "front"))[0]
    command = part.cmdline()
    return Path(command[command.index("--run") + 1])


def serving(worker: Service) -> list[int]:
    """The pids of the fronts that take jobs."""
    found = []
    with suppress(IndexError, psutil.Error):
        folder = run_folder(worker)
        for each in processes(worker, "front"):
            command = each.cmdline()
            number = command[command.index("--number") + 1]
            status = read_status(folder / f"front-{number}.json")
            if status is not None and status.pid == each.pid and status.taking:
                found.append(each.pid)
    return found
