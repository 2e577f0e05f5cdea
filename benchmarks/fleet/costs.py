"""What a job and a worker cost: from the figures that were measured."""

import json
from dataclasses import dataclass
from typing import Any

from benchmarks import results


@dataclass(frozen=True)
class Costs:
    """us: of Redis' one core, for a job by its client and by its worker, and for a worker a second.

    open_bytes, ended_bytes: of Redis, for a job that is open and for one that is kept.
    job_commands, idle_commands: of Redis, those in scripts too, for a job and a worker a second.
    """

    submit_us: float
    work_us: float
    idle_us: float
    open_bytes: float = 0.0
    ended_bytes: float = 0.0
    job_commands: float = 0.0
    idle_commands: float = 0.0

    @property
    def job_us(self) -> float:
        """Of a job, from its submit to its result."""
        return self.submit_us + self.work_us


@dataclass(frozen=True)
class Gpu:
    """A worker. A pass takes ``pass_s``, and ``row_s`` more for each of its at most ``batch`` jobs.

    held: jobs that it has claimed at most, those of the pass among them. lease_s: after which they
    are published again if it is killed. cold_s: from its start until it serves.
    """

    pass_s: float
    row_s: float
    batch: int
    held: int
    lease_s: float = 30.0
    cold_s: float = 0.0

    @property
    def per_s(self) -> float:
        """Jobs a second at the most."""
        return self.batch / (self.pass_s + self.batch * self.row_s)


#: Slots of the engine that was measured, and new tokens of each job.
SLOTS, TOKENS = 128, 20


def of_the_queue(idle_us: float) -> Costs:
    """A job's, as ``benchmarks.cost`` and ``benchmarks queued`` found them last."""
    cost, queued = _found("cost"), _found("queued")
    worker = cost["redis_worker_us"]["now"]
    return Costs(
        submit_us=cost["redis_us"]["now"] - worker,
        work_us=worker,
        idle_us=idle_us,
        open_bytes=queued["bytes_per_job"],
        ended_bytes=cost["bytes"]["now"],
    )


def of_a_gpu() -> Gpu:
    """Greedy captions on the card that was measured: a job alone, and as many as it has slots."""
    text = (results.FOLDER / "gpu" / "last.json").read_text()
    sections = json.loads(text)["sections"]
    found = {name: each["found"] for name, each in sections.items()}
    alone_s = (found["looks"]["1"]["ms"] + TOKENS * found["steps: opt-2.7b"]["1"]["ms"]) / 1000
    full_s = SLOTS / found[f"engine: greedy, {SLOTS} slots"]["per_s"]
    row_s = (full_s - alone_s) / (SLOTS - 1)
    cold_s = found["service, as it comes: start"]["first_answer_s"]
    return Gpu(alone_s - row_s, row_s, SLOTS, 2 * SLOTS, cold_s=cold_s)


def _found(section: str) -> dict[str, Any]:
    kept = results.load(section)
    if kept is None:
        raise FileNotFoundError(f"no figures of {section}: see benchmarks/results")
    found: dict[str, Any] = kept["found"]
    return found
