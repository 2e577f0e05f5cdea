"""This version and the one before it, as processes on one rig.

A clone may lack the history, so that ``8b87bc7.tar.xz`` has what is needed of it::

    git archive 8b87bc7 producer worker benchmarks/__init__.py benchmarks/workers.py \\
      ':!worker/blipq_worker/demo' ':!worker/blipq_worker/bench' ':!worker/blipq_worker/page' |
      xz -9e > 8b87bc7.tar.xz
"""

import json
import os
import subprocess
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blipq.local.supervisor import Service
from conftest import ROOT, wait_until
from guarantees.earlier import submitting
from guarantees.rig import LEASE_S, Rig, named

ARCHIVE = Path(__file__).with_name("8b87bc7.tar.xz")
#: Runs with the version before alone.
PREPARING = Path(__file__).with_name("preparing.py")


@dataclass(frozen=True)
class Version:
    """A checkout, run with the packages that are installed here."""

    folder: Path

    def start_worker(self, rig: Rig, *, pass_s: float = 0.0, **options: Any) -> Service:
        """A worker that serves, with a model that takes ``pass_s`` for each pass."""
        options = {"lease_s": LEASE_S, "drain_timeout_s": 10, "fronts": 0} | options
        options["models"] = f"default={1000 * pass_s}+0"
        environment = self._environment(rig) | {"BENCH_FETCH": "0"} | named(options)
        command = [sys.executable, "-P", "-m", "benchmarks.workers", "sleeping"]
        log = rig.folder / f"worker-{len(rig.workers)}.log"
        return rig.serve(Service("worker", command, env=environment, log=log))

    def start_producer(self, rig: Rig, name: str) -> "Producer":
        """A client that submits jobs until it is told to stop."""
        producer = Producer(self.folder, rig, name, self._environment(rig))
        producer.start()
        return producer

    def stored(self, jobs: list[Any]) -> list[dict[str, str]]:
        """See ``preparing.py``."""
        done = subprocess.run(
            [sys.executable, "-P", str(PREPARING)],
            input=json.dumps(jobs),
            env=os.environ | self._path,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
            timeout=60,
        )
        found: list[dict[str, str]] = json.loads(done.stdout)
        return found

    @property
    def _path(self) -> dict[str, str]:
        places = [self.folder, self.folder / "producer", self.folder / "worker"]
        return {"PYTHONPATH": ":".join(str(each) for each in places)}

    def _environment(self, rig: Rig) -> dict[str, str]:
        return rig.stack.environment() | {"OMP_NUM_THREADS": "1"} | self._path


class Producer:
    """See ``submitting.py``. Its log has what it found."""

    def __init__(self, folder: Path, rig: Rig, name: str, environment: dict[str, str]) -> None:
        self._stop = rig.folder / f"{name}.stop"
        self._log = rig.folder / f"{name}.log"
        command = [sys.executable, "-P", str(submitting.__file__), str(folder), str(self._stop)]
        self.service = Service(name, command, env=environment, log=self._log)

    def start(self) -> None:
        self.service.start()
        wait_until(lambda: self._lines() or self.service.exit_code is not None, "a first job")
        assert self.service.exit_code is None, self.service.last_words(40)

    def outcomes(self) -> dict[str, list[Any]]:
        """Stops it, and waits: of each job its status, text, attempts and worker."""
        self._stop.touch()
        self.service.wait(120)
        assert self.service.exit_code == 0, self.service.last_words(40)
        found: dict[str, list[Any]] = json.loads(self._lines()[-1])
        return found

    def _lines(self) -> list[str]:
        return self._log.read_text().splitlines()


def this() -> Version:
    """The version under test."""
    return Version(ROOT)


def earlier(folder: Path) -> Version:
    """The one before it, unpacked in the folder."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    return Version(folder)
