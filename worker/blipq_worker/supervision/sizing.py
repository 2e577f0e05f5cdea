"""How many fronts a worker has."""

from blipq_worker.process.fleet import cores, fronts_on, on_gpu
from blipq_worker.settings import WorkerSettings


def fronts_of(options: WorkerSettings) -> int:
    """Fronts of a worker on this machine; 0: it does all in one process.

    On a CPU the model computes on the cores that fronts would need.
    """
    if options.fronts is not None:
        return options.fronts
    return fronts_on(cores()) if on_gpu(options.device) else 0
