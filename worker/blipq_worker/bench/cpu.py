"""Whose CPU time a run takes."""

from collections.abc import Mapping
from dataclasses import dataclass

import psutil
import torch


@dataclass(frozen=True)
class Used:
    """CPU seconds of a process until now, and of each of its living threads."""

    total: float
    threads: Mapping[int, float]

    def since(self, before: "Used", model_threads: int) -> dict[str, float]:
        """Seconds of the threads that the model ran on, the busiest ones, and of all others."""
        grown = sorted(each - before.threads.get(id, 0.0) for id, each in self.threads.items())
        model = sum(grown[-model_threads:])
        return {"model": model, "others": self.total - before.total - model}


def used(pid: int | None) -> Used:
    """Of a process; of this one where there is no pid."""
    process = psutil.Process(pid)
    times = process.cpu_times()
    threads = {each.id: each.user_time + each.system_time for each in process.threads()}
    return Used(times.user + times.system, threads)


def model_threads(environment: Mapping[str, str]) -> int:
    """How many threads torch computes with in such an environment."""
    return int(environment.get("OMP_NUM_THREADS", torch.get_num_threads()))
