"""Measures workloads bare and through the service, and how long jobs take under load."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from blipq_worker.bench.pictures import Pictures
from blipq_worker.bench.stack import BenchError, Stack, running
from blipq_worker.bench.workloads import Workload
from blipq_worker.demo.machine import describe_machine
from blipq_worker.process.fleet import shares_of_cores
from blipq_worker.settings import WorkerSettings

LIBRARIES = ("torch", "transformers", "celery", "kombu", "redis", "boto3")


@dataclass(frozen=True)
class Bench:
    """What is measured. ``environment`` holds the worker's settings, as BLIPQ_* variables.

    program: what stands in for the worker's own. processes: workers, or bare engines, that share
    the cores.
    """

    environment: Mapping[str, str]
    pictures: Pictures
    jobs: int
    program: Sequence[str] | None = None
    processes: int = 1

    def ceilings(self, workloads: Sequence[Workload]) -> dict[str, Any]:
        """The bare engine's images a second, by workload."""
        with TemporaryDirectory(prefix="blipq-pictures-") as folder:
            for number, picture in enumerate(self.pictures.take(self.jobs)):
                (Path(folder) / f"{number:06}.jpg").write_bytes(picture)
            names = [each.name for each in workloads]
            command = [sys.executable, "-P", "-m", "blipq_worker.bench.bare", folder]
            ran = subprocess.run(
                [*command, str(self.jobs), str(self.processes), *names],
                env={**os.environ, **shares_of_cores(self.processes), **self.environment},
                stdout=subprocess.PIPE,
                text=True,
            )
        if ran.returncode:
            raise BenchError(f"the bare engine ended with {ran.returncode}")
        found: dict[str, Any] = json.loads(ran.stdout)
        return found

    def through(self, workloads: Sequence[Workload]) -> dict[str, Any]:
        """The service's images a second while its backlog is full, by workload."""
        with running() as stack:
            stack.start_workers(self.environment, self.program, processes=self.processes)
            return {each.name: self._through(stack, each) for each in workloads}

    def _through(self, stack: Stack, workload: Workload) -> dict[str, Any]:
        """As many as the workers hold come before the jobs that are measured, and after."""
        held = self._held()
        count = held + workload.images(self.jobs) + held
        images = stack.upload(self.pictures.take(count))
        through = stack.backlog(list(workload.requests(images)))
        return {
            "images_per_s": through.steady_per_s(held),
            "cpu_ms": through.cpu_ms(),
            "cores_busy": through.cores_busy,
            "stages_ms": through.stages(),
        }

    def _held(self) -> int:
        """Jobs that the workers hold."""
        named = {
            name.removeprefix("BLIPQ_").lower(): each for name, each in self.environment.items()
        }
        return self.processes * WorkerSettings.model_validate(named).threads

    def latencies(self, workload: Workload, rates: Mapping[str, float]) -> dict[str, Any]:
        """Seconds from submit to outcome under Poisson arrivals, by the name of a rate."""
        found = {}
        with running() as stack:
            stack.start_workers(self.environment, self.program, processes=self.processes)
            images = stack.upload(self.pictures.take(self._held()))
            stack.backlog(list(workload.requests(images)))
            for name, per_s in rates.items():
                images = stack.upload(self.pictures.take(self.jobs))
                through = stack.arriving(list(workload.requests(images)), per_s)
                found[name] = {
                    "per_s": per_s,
                    "p50_s": through.percentile(0.5),
                    "p99_s": through.percentile(0.99),
                    "cores_busy": through.cores_busy,
                }
        return found


def about_this_run() -> dict[str, Any]:
    """The machine, the versions, and how busy the machine is with other things now."""
    return {
        "machine": describe_machine(),
        "python": sys.version.split()[0],
        "versions": {name: version(name) for name in LIBRARIES},
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    }
