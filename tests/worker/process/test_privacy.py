"""Keys of models are closed to what else runs as the worker's user, as fronts do."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

#: Another user than root, whose rights would open everything.
USER = 65534 if os.geteuid() == 0 else os.geteuid()

#: Becomes that user, then what is named, and says when its keys should be hidden.
CODE = """
import ctypes, os, sys
import transformers.utils.logging
import blipq.s3.storage, boto3
import blipq_worker.__main__ as module
import blipq_worker.process.fleet as fleet
import blipq_worker.serving.engine as engine
import blipq_worker.supervision.worker as worker

def stay(*_):
    print("as it works", flush=True)
    sys.stdin.readline()
    sys.exit(0)

engine.run_engine = worker.SplitWorker = fleet.workers_on = stay
module._settings = lambda: (module.checked(module.Settings), module.checked(module.WorkerSettings))
os.setuid(int(sys.argv[1]))
ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)  # as after an exec
print("started", flush=True)
sys.stdin.readline()
{"engine": lambda: module._engine(["--run", "/"]), "worker": module._worker,
 "several": lambda: fleet.run_many("all", 1)}[sys.argv[2]]()
"""


@contextmanager
def process(what: str, **variables: str) -> Iterator[subprocess.Popen[str]]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("BLIPQ_")}
    started = subprocess.Popen(
        [sys.executable, "-c", CODE, str(USER), what],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**kept, "BLIPQ_FRONTS": "1", "BLIPQ_LOG_LEVEL": "ERROR", **variables},
    )
    try:
        yield started
    finally:
        started.kill()
        started.communicate(timeout=30)


def read(pid: int, name: str) -> str | None:
    """What another process of the same user reads there; None where it may not."""
    user = USER if os.geteuid() == 0 else None
    ran = subprocess.run(
        ["cat", f"/proc/{pid}/{name}"], capture_output=True, text=True, user=user, timeout=10
    )
    return ran.stdout if ran.returncode == 0 else None


def reaches(started: "subprocess.Popen[str]", step: str) -> None:
    assert started.stdout is not None
    assert started.stdout.readline() == f"{step}\n"


@pytest.mark.skipif(sys.platform != "linux", reason="what is hidden is Linux's /proc")
@pytest.mark.parametrize("what", ["engine", "worker", "several"])
def test_what_has_keys_of_models_hides_its_environment_and_is_still_counted(what: str) -> None:
    keys = {"BLIPQ_MODEL_S3_ACCESS_KEY_ID": "id", "BLIPQ_MODEL_S3_SECRET_ACCESS_KEY": "hush"}
    with process(what, **keys) as started:
        reaches(started, "started")
        assert "hush" in (read(started.pid, "environ") or "")
        assert started.stdin is not None
        started.stdin.write("\n")
        started.stdin.flush()
        reaches(started, "as it works")
        assert read(started.pid, "environ") is None
        assert read(started.pid, "maps") is None
        assert "python" in (read(started.pid, "stat") or "")
        assert read(started.pid, "statm") is not None
        assert read(started.pid, "cmdline") is not None


@pytest.mark.skipif(sys.platform != "linux", reason="what is hidden is Linux's /proc")
def test_a_worker_without_such_keys_is_as_open_as_any_process() -> None:
    with process("engine") as started:
        reaches(started, "started")
        assert started.stdin is not None
        started.stdin.write("\n")
        started.stdin.flush()
        reaches(started, "as it works")
        assert "BLIPQ_FRONTS" in (read(started.pid, "environ") or "")
