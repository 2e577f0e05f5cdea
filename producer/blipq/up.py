"""``blipq up``: the local stack in the foreground, with a worker that is restarted if it dies.

Where BLIPQ_WEBHOOK_SECRETS is set it also sends webhooks.
"""

import signal
import sys
import threading
from pathlib import Path

from blipq.fleet import EXIT_MODEL
from blipq.local import REDIS_PORT, S3_PORT, LocalStack, sender_service, worker_service
from blipq.settings import cache_folder, read_stack_file
from blipq.supervisor import Service, supervise


def run(
    redis_port: int | None, s3_port: int | None, folder: Path | None, *, with_worker: bool
) -> int:
    """Runs the stack until SIGINT or SIGTERM; the exit code."""
    running = read_stack_file()
    if running is not None:
        tell(f"a local stack runs already (pid {running['pid']}); stop it with: blipq down")
        return 1
    stack = LocalStack(
        folder=folder or cache_folder() / "stack",
        redis_port=redis_port or REDIS_PORT,
        s3_port=s3_port or S3_PORT,
    )
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    tell(f"starting a local stack in {stack.folder}")
    stack.start()
    started: list[Service] = []
    try:
        stack.announce()
        tell(f"using {stack.settings().endpoints}")
        if with_worker:
            started.append(worker_service(stack.environment(), None))
        if stack.settings().webhook_secrets:
            started.append(sender_service(stack.environment()))
        for service in started:
            service.start()
        tell("blipq commands and Client() on this machine use it now; Ctrl-C stops it")
        return supervise([*started, *stack.services], stop, tell=tell, give_up_on=(EXIT_MODEL,))
    finally:
        tell("stopping")
        for service in started:
            service.stop(timeout=90)
        stack.withdraw()
        stack.stop()


def tell(text: str) -> None:
    """One line for the person at the terminal."""
    print(text, file=sys.stderr, flush=True)
