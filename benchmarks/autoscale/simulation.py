"""Bursts of jobs on a fleet that scales from nothing, and what came of them."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from benchmarks.autoscale.autoscaler import Autoscaler, Scaling
from benchmarks.autoscale.fleet import BEAT_S, Fleet
from blipq import Client, Job, JobInfo, Status
from blipq.contract import CaptionRequest, Generation, ImageRef, VQARequest

#: Milliseconds of a pass, and of each prompt in it.
TIMES = "100+100"
#: Seconds of a caption, and of a job with QUESTIONS.
QUESTIONS = 8
SHORT_S, LONG_S = 0.2, 0.1 + 0.1 * QUESTIONS
#: Between two steps of the simulation.
STEP_S = 0.05


@dataclass(frozen=True)
class Burst:
    """Jobs that are submitted ``at`` seconds: captions (short), and many questions each (long)."""

    at: float
    captions: int = 0
    questions: int = 0

    def requests(self, image: ImageRef) -> list[CaptionRequest | VQARequest]:
        """No two equal: equal jobs would be computed once."""
        greedy = Generation(num_beams=1, max_new_tokens=8)
        mark = f"at {self.at}"
        asked = [
            tuple(f"{mark}, {n}, {q}?" for q in range(QUESTIONS)) for n in range(self.questions)
        ]
        return [
            *(
                CaptionRequest(image=image, prompt=f"{mark}, {n}", generation=greedy)
                for n in range(self.captions)
            ),
            *(VQARequest(image=image, questions=each, generation=greedy) for each in asked),
        ]


@dataclass
class Prediction:
    """What the exporter predicted for the jobs that were open then. at: seconds since 1970."""

    at: float
    seconds: float


@dataclass
class Outcome:
    """Of a simulation. pods: their number over time, where it changed."""

    infos: Sequence[JobInfo]
    pods: Sequence[int]
    stopped: int
    wronged: Sequence[str]
    worker_s: float
    predictions: Sequence[Prediction]

    def waits(self) -> list[float]:
        """Seconds from submit to start, in order."""
        return sorted(
            (i.started_at - i.created_at).total_seconds() for i in self.infos if i.started_at
        )

    def p95_s(self) -> float:
        """The wait that 95 % of the jobs stay under."""
        waits = self.waits()
        return waits[min(len(waits) - 1, int(0.95 * len(waits)))]

    def failed(self) -> list[JobInfo]:
        """Jobs that did not succeed."""
        return [info for info in self.infos if info.status is not Status.SUCCEEDED]

    def took_s(self, prediction: Prediction) -> float:
        """GPU-seconds of the jobs that a prediction was for."""
        return sum(
            (info.receipt.gpu_ms or 0.0) / 1000
            for info in self.infos
            if info.receipt
            and info.completed_at
            and info.created_at.timestamp() <= prediction.at < info.completed_at.timestamp()
        )


@dataclass
class Simulation:
    """A run. metric: what the autoscaler reads. work: predicted GPU-seconds of the open jobs."""

    client: Client
    image: ImageRef
    fleet: Fleet
    scaling: Scaling
    metric: Callable[[], float]
    work: Callable[[], float]
    jobs: list[Job[object]] = field(default_factory=list)
    predictions: list[Prediction] = field(default_factory=list)

    def run(self, bursts: Sequence[Burst], limit_s: float) -> Outcome:
        """Submits the bursts and scales until all jobs have ended and no worker is left.

        Raises TimeoutError after ``limit_s`` seconds, and WorkerDied.
        """
        autoscaler, left = Autoscaler(self.scaling), list(bursts)
        started = now = polled = costed = time.monotonic()
        worker_s, counts = 0.0, [0]
        while left or self.fleet.pods or self.fleet.leaving or not self._ended():
            if now - started > limit_s:
                raise TimeoutError(f"pods {counts}, bursts left {left}")
            if left and now - started >= left[0].at:
                self._submit(left.pop(0))
            self.fleet.observe(now, self.scaling.costs_s + 2 * BEAT_S)
            if now >= costed:
                costed = now + self.scaling.costs_s
                self.fleet.write_costs()
            if now >= polled:
                polled = now + self.scaling.polling_s
                self.fleet.scale(autoscaler.pods(now, len(self.fleet.pods), self.metric()))
                counts += [len(self.fleet.pods)] * (len(self.fleet.pods) != counts[-1])
            time.sleep(STEP_S)
            self.fleet.reap()
            passed = time.monotonic() - now
            worker_s += passed * (len(self.fleet.pods) + len(self.fleet.leaving))
            now += passed
        infos = [job.info() for job in self.jobs]
        return Outcome(
            infos, counts, self.fleet.stopped, self.fleet.wronged, worker_s, self.predictions
        )

    def _submit(self, burst: Burst) -> None:
        self.jobs += self.client.submit_many(burst.requests(self.image))
        if burst.captions and burst.questions:
            self.predictions.append(Prediction(time.time(), self.work()))

    def _ended(self) -> bool:
        """Whether all jobs have; an ended job never changes, so the last are read first."""
        return all(job.info().ended for job in reversed(self.jobs))
