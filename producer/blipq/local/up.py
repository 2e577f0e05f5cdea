"""``blipq up``: the local stack in the foreground, with a worker that is restarted if it dies.

Where ``blipq-api`` is installed it also answers HTTP, and where BLIPQ_WEBHOOK_SECRETS is set it
also sends webhooks.
"""

import os
import shlex
import signal
import sys
import threading
from contextlib import suppress
from pathlib import Path

import redis

from blipq.errors import BlipqError
from blipq.ledger.connection import connect
from blipq.ledger.operator import OperatorLedger
from blipq.local.door import NO_DOOR, LocalDoor, has_door
from blipq.local.sample import red_square
from blipq.local.stack import (
    API_PORT,
    REDIS_PORT,
    S3_PORT,
    LocalStack,
    check_port,
    sender_service,
    worker_service,
)
from blipq.local.supervisor import Service, supervise
from blipq.local.worker import EXIT_MODEL
from blipq.program import blipq
from blipq.settings import cache_folder, read_stack_file


def run(
    redis_port: int | None,
    s3_port: int | None,
    api_port: int | None,
    folder: Path | None,
    *,
    with_worker: bool,
) -> int:
    """Runs the stack until SIGINT or SIGTERM; the exit code."""
    running = read_stack_file()
    if running is not None:
        report(f"a local stack runs already (pid {running['pid']}); stop it with: {blipq('down')}")
        return 1
    stack = LocalStack(
        folder=folder or cache_folder() / "stack",
        redis_port=redis_port or REDIS_PORT,
        s3_port=s3_port or S3_PORT,
    )
    door = LocalDoor(stack.folder, api_port or API_PORT) if has_door() else None
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    report(f"starting a local stack in {stack.folder}")
    if door is not None:
        check_port("api", door.port)
    stack.start()
    started: list[Service] = []
    try:
        stack.announce()
        report(f"using {stack.settings().endpoints}")
        if with_worker:
            started.append(worker_service(stack.environment(), None))
        if stack.settings().webhook_secrets:
            started.append(sender_service(stack.environment()))
        if door is not None:
            started.append(door.service(stack.environment()))
        for service in started:
            service.start()
        report("blipq commands and Client() on this machine use it now; Ctrl-C stops it")
        report(f'for redis-cli, boto3, Celery, Flower and others: eval "$({blipq("env")})"')
        threading.Thread(target=_greet, args=(stack, stop), daemon=True).start()
        if door is not None:
            threading.Thread(target=door.introduce, args=(report, stop), daemon=True).start()
        else:
            report(NO_DOOR)
        return supervise([*started, *stack.services], stop, report=report, give_up_on=(EXIT_MODEL,))
    finally:
        report("stopping")
        for service in started:
            service.stop(timeout=90)
        stack.withdraw()
        stack.stop()


def _greet(stack: LocalStack, stop: threading.Event) -> None:
    """Once a worker is live, prints what to try, so that it stands below the worker's log."""
    picture = stack.folder / "red-square.png"
    picture.write_bytes(red_square())
    with connect(stack.settings()) as raw:
        operator = OperatorLedger(raw, stack.settings())
        while not stop.wait(0.5):
            with suppress(BlipqError, redis.RedisError):
                if any("default" in worker["models"] for worker in operator.workers().values()):
                    command = blipq(f"caption {_short(picture)}")
                    report(f"ready; try in another terminal:\n\n    {command}\n")
                    return


def _short(path: Path) -> str:
    """A path as a shell takes it, from the user's home where it is there."""
    home = os.path.expanduser("~")
    if path.is_relative_to(home):
        return f"~/{shlex.quote(str(path.relative_to(home)))}"
    return shlex.quote(str(path))


def report(text: str) -> None:
    """One line for the person at the terminal."""
    print(text, file=sys.stderr, flush=True)
