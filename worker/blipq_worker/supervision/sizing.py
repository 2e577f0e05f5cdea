"""How many fronts a worker has."""

import os
from pathlib import Path

from blipq.local.fleet import cores, fronts_on
from blipq_worker.settings import WorkerSettings

_DEVICES = Path("/dev")


def fronts_of(options: WorkerSettings) -> int:
    """Fronts of a worker on this machine; 0: it does all in one process.

    On a CPU the model computes on the cores that fronts would need.
    """
    if options.fronts is not None:
        return options.fronts
    return fronts_on(cores()) if _on_gpu(options.device) else 0


def _on_gpu(device: str) -> bool:
    """Whether the model will run on a GPU, as far as can be told without importing torch."""
    if device != "auto":
        return device.startswith("cuda")
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1"):
        return False
    return any(_DEVICES.glob("nvidia[0-9]*"))
