"""``blipq worker``: one process, or several supervised ones: per GPU, or on shares of the cores."""

import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from pydantic import TypeAdapter

from blipq.contract import Seconds
from blipq.errors import InvalidRequest
from blipq.local.supervisor import Service, supervise
from blipq.local.worker import EXIT_MODEL, NO_WORKER, has_worker
from blipq_worker.process.gpus import workers_on

COMMAND = [sys.executable, "-P", "-m", "blipq_worker"]

#: Microseconds of CPU in a period, and the period (cgroup v2); "max" where there is no quota.
CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")

#: Where GPUs show.
DEVICES = Path("/dev")

MOST_FRONTS = 16


def run_one() -> None:
    """Becomes a worker process. Does not return."""
    _require_worker()
    os.execv(COMMAND[0], COMMAND)


def run_many(gpus: str | None, processes: int) -> int:
    """Runs several workers and starts again what dies; the exit code.

    Each is a process, with fronts of its own where the settings give it some.

    gpus: see ``gpus.workers_on``; None leaves the device to the settings. processes: for each GPU,
    or in all. SIGTERM and SIGINT drain them all. One that cannot serve its model is given up alone:
    the others have GPUs of their own.
    """
    from blipq_worker.process.privacy import hide_keys_of_models

    _require_worker()
    hide_keys_of_models()
    if gpus is None:
        device = os.environ.get("BLIPQ_DEVICE", "auto")
        share = shares_of_fronts(processes) | beside(processes) if on_gpu(device) else {}
        places = [("worker", {**shares_of_cores(processes), **share})]
    else:
        found = workers_on(gpus)
        share = shares_of_fronts(len(found) * processes) | beside(processes)
        places = [(f"worker on GPU {name}", {**given, **share}) for name, given in found]
    workers = [
        (f"{name}, {number}" if processes > 1 else name, environment)
        for name, environment in places
        for number in range(1, processes + 1)
    ]
    services = [
        Service(name, COMMAND, env={**environment, **_health_port(place)})
        for place, (name, environment) in enumerate(workers)
    ]
    return run_supervised(services, drain_s=_drain_timeout_s())


def shares_of_cores(processes: int) -> dict[str, str]:
    """The environment of each of so many workers that compute on this machine's cores."""
    if processes == 1 or "OMP_NUM_THREADS" in os.environ:
        return {}
    return {"OMP_NUM_THREADS": str(max(1, cores() // processes))}


def shares_of_fronts(workers: int) -> dict[str, str]:
    """The environment of each of so many workers that share this machine's cores around GPUs."""
    if workers == 1 or "BLIPQ_FRONTS" in os.environ:
        return {}
    return {"BLIPQ_FRONTS": str(fronts_on(cores() // workers))}


def beside(workers: int) -> dict[str, str]:
    """The environment of each of so many workers on one GPU.

    Each would find the memory free that the others are about to take.
    """
    if workers == 1 or os.environ.get("BLIPQ_QUANTIZATION", "auto") != "auto":
        return {}
    return {"BLIPQ_QUANTIZATION": "nf4"}


def fronts_on(cores: int) -> int:
    """How many fronts a worker on a GPU has, for so many cores: one core is the model's."""
    return max(1, min(MOST_FRONTS, cores - 1))


def on_gpu(device: str) -> bool:
    """Whether a model will run on a GPU, as far as is known without importing torch.

    device: as BLIPQ_DEVICE has it.
    """
    if device != "auto":
        return device.startswith("cuda")
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1"):
        return False
    return any(DEVICES.glob("nvidia[0-9]*"))


def cores() -> int:
    """Cores that this process may use: by its affinity, and by the quota of its container."""
    allowed = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    with suppress(OSError, ValueError):
        quota, period = CPU_QUOTA.read_text().split()
        allowed = min(allowed, max(1, int(quota) // int(period)))
    return allowed


def run_supervised(services: Sequence[Service], *, drain_s: float) -> int:
    """Runs services until a signal comes, then drains them side by side."""
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    for service in services:
        service.start()
    try:
        return supervise(
            services,
            stop,
            report=_report,
            give_up_on=(EXIT_MODEL,),
            one_by_one=True,
            reaps=os.getpid() == 1,
        )
    finally:
        for service in services:
            service.signal(signal.SIGTERM)
        # One signal each: a second one makes a worker hand its jobs back at once.
        deadline = time.monotonic() + drain_s + 10
        for service in services:
            service.wait(max(0.0, deadline - time.monotonic()))


def _require_worker() -> None:
    if not has_worker():
        raise InvalidRequest(NO_WORKER)


def _health_port(place: int) -> dict[str, str]:
    """One per process, upwards from that of the settings."""
    first = os.environ.get("BLIPQ_HEALTH_PORT")
    return {"BLIPQ_HEALTH_PORT": str(int(first) + place)} if first else {}


def _drain_timeout_s() -> float:
    """The workers' own deadline; a process that outlasts it by more than a little is killed."""
    return TypeAdapter(Seconds).validate_python(os.environ.get("BLIPQ_DRAIN_TIMEOUT_S", 60.0))


def _report(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
