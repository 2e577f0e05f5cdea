"""The demo: servers and a worker for a minute, pictures of known content, every answer checked.

The servers are its own, on free ports, whatever the settings say; nothing of it stays behind.
"""

import os
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from blipq.client.job import Job
from blipq.client.sync_client import Client
from blipq.contract import ImageRef, JobInfo, MatchResult
from blipq.errors import BlipqError, ResultTimeout
from blipq.ledger.operator import OperatorLedger
from blipq.local.stack import LocalStack, worker_service
from blipq.local.supervisor import Service
from blipq.settings import CONNECTION_FIELDS
from blipq_worker.demo.machine import describe_machine
from blipq_worker.demo.options import Options
from blipq_worker.demo.output import errors, print_error, print_line, print_result, progress
from blipq_worker.demo.report import write_report
from blipq_worker.demo.score import Answer, Answered, Case, Explained, Run, cases_of
from blipq_worker.demo.signals import Signals
from blipq_worker.demo.world import DEMO_SEEDS, Demonstration, demonstration, render

#: Settings of the user that would lead the demo to services, or refuse its pictures.
NOT_OURS = (
    *CONNECTION_FIELDS,
    "s3_region",
    "inbox_bucket",
    "allowed_buckets",
    "image_formats",
    "health_port",
)
START_TIMEOUT_S = 300.0
#: No job ended for this long: the worker hangs.
STALLED_S = 120.0


class DemoError(BlipqError):
    """The demo cannot run; the message has the reason."""


@dataclass(frozen=True)
class Parts:
    """What a demo runs on."""

    client: Client
    worker: Service
    folder: Path
    signals: Signals

    def check(self) -> None:
        """Raises Interrupted after a signal, and DemoError with the worker's last words."""
        self.signals.check()
        if self.worker.exit_code is not None:
            words = self.worker.last_words()
            raise DemoError(f"the worker ended with {self.worker.exit_code}:\n{words}")


def give(options: Options, signals: Signals) -> int:
    """Gives the demo, writes the report and prints the outcome; the exit code."""
    signals.check()
    try:
        run = demonstrate(options, signals)
        write_report(run, options.report)
    except (BlipqError, OSError) as error:
        print_error(error, options.as_json)
        return 1
    print_result(run, options)
    return 0 if run.tally.passed else 1


def demonstrate(options: Options, signals: Signals) -> Run:
    """Starts the stack, submits all jobs, and stops the stack. Raises BlipqError."""
    check_folder(options.report)
    chosen = f"{options.images} pictures, seed {options.seed}"
    print_line(f"{chosen}; to see them again: {options.command}")
    with running(options, signals) as parts:
        shown = choose(options.images, options.seed)
        images = upload(shown, parts)
        wait_for_worker(parts)
        answers = list(ask_all(shown, images, parts))
        explained = explain(shown, images, parts)
        print_line("stopping the worker and the servers")
    return Run(
        seed=options.seed,
        shown=shown,
        answers=answers,
        machine=describe_machine(),
        command=options.command,
        explained=explained,
    )


@contextmanager
def running(options: Options, signals: Signals) -> Iterator[Parts]:
    """Redis, S3 and a worker that loads its model, in a folder that goes away with them."""
    for name in NOT_OURS:
        os.environ.pop(f"BLIPQ_{name.upper()}", None)
    with ExitStack() as stack:
        with signals.held():
            folder = Path(stack.enter_context(TemporaryDirectory(prefix="blipq-demo-")))
            local, worker = start(options, folder, stack)
            stack.callback(signals.ignore)
        print_line(f"Redis and S3 run in {folder}, on ports {local.redis_port} and {local.s3_port}")
        with Client(local.settings()) as client:
            yield Parts(client, worker, folder, signals)


def start(options: Options, folder: Path, stack: ExitStack) -> tuple[LocalStack, Service]:
    """Starts the servers and the worker; the stack stops them."""
    local = LocalStack(folder, persistent=False)
    environment = worker_environment(options, folder) | local.environment()
    worker = worker_service(environment, folder / "worker.log")
    stack.callback(local.stop)
    stack.callback(worker.stop, timeout=5)
    local.start()
    worker.start()
    return local, worker


def worker_environment(options: Options, folder: Path) -> dict[str, str]:
    """The worker's settings. It leaves a core to the servers, and drops its jobs when stopped."""
    threads = max(1, min(8, (os.cpu_count() or 2) - 1))
    return {
        "TMPDIR": str(folder),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)),
        "BLIPQ_MODELS": f"default={options.model}",
        "BLIPQ_QUANTIZATION": options.quantization,
        "BLIPQ_DRAIN_TIMEOUT_S": "1",
    }


def choose(images: int, seed: int) -> list[Demonstration]:
    """Different scenes, nothing left out; the same for the same seed."""
    chosen = random.Random(f"demo {seed}").sample(range(len(DEMO_SEEDS)), images)
    return [demonstration(number) for number in chosen]


def upload(shown: Sequence[Demonstration], parts: Parts) -> list[ImageRef]:
    """Puts every picture into the bucket."""
    pictures = parts.folder / "pictures"
    pictures.mkdir()
    images = []
    for number, about in enumerate(shown):
        parts.check()
        path = pictures / f"{number}.png"
        render(about.scene).save(path)
        images.append(parts.client.storage.upload(path))
    print_line(f"{len(images)} pictures drawn and uploaded")
    return images


def wait_for_worker(parts: Parts) -> None:
    """Waits until the worker serves the model."""
    deadline = time.monotonic() + START_TIMEOUT_S
    operator = OperatorLedger.beside(parts.client.ledger)
    with errors.status("the worker loads the model"):
        while not operator.workers():
            parts.check()
            if time.monotonic() > deadline:
                raise DemoError(f"the worker is not ready after {START_TIMEOUT_S:g} s")
            time.sleep(0.05)
    print_line("the worker is ready")


def ask_all(
    shown: Sequence[Demonstration], images: Sequence[ImageRef], parts: Parts
) -> Iterator[Answered]:
    """Submits every job, then takes the results in as they come."""
    questions = [case for n, about in enumerate(shown) for case in cases_of(n, about)]
    with progress() as bar:
        task = bar.add_task("answers", total=len(questions))
        jobs = [submit(case, images[case.picture], parts) for case in questions]
        for case, job in zip(questions, jobs, strict=True):
            yield Answered(case, ended(job, parts))
            bar.advance(task)


def submit(case: Case, image: ImageRef, parts: Parts) -> Job[Answer]:
    """Sends one job."""
    parts.check()
    return case.submit(parts.client, image)


def explain(
    shown: Sequence[Demonstration], images: Sequence[ImageRef], parts: Parts
) -> Explained | None:
    """Where the model looks for what a picture shows; None where it has no heat map."""
    picture = max(range(len(shown)), key=lambda place: len(shown[place].scene.shapes))
    text = shown[picture].matching_text
    result = ended(parts.client.match(images[picture], text, explain=True), parts).result
    return Explained(picture, result.best) if isinstance(result, MatchResult) else None


def ended(job: Job[Any], parts: Parts) -> JobInfo:
    """The job when it has ended. Raises DemoError when the worker dies or hangs."""
    deadline = time.monotonic() + STALLED_S
    while True:
        parts.check()
        try:
            return job.wait(timeout=1)
        except ResultTimeout as error:
            if time.monotonic() > deadline:
                raise DemoError(f"{error}:\n{parts.worker.last_words()}") from None


def check_folder(report: Path) -> None:
    """Raises DemoError early where the report could not be written at the end."""
    if report.is_dir() or not os.access(report.absolute().parent, os.W_OK):
        raise DemoError(f"cannot write the report {report}")
