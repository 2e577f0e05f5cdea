"""How the run of a message ends other than well."""

from blipq.contract import ErrorCode
from blipq.errors import TransientError


class JobFailedTask(Exception):
    """Tells Celery that the job failed, so that its monitors show a failed task."""


class HandBack(Exception):
    """The message must go back to its queue: this worker cannot run it now."""


class EngineLost(TransientError):
    """The engine is gone, and with it the job's requests: no fault of most jobs.

    started: a pass that the job took part in had begun, and may have ended the engine.
    """

    def __init__(self, message: str, *, started: bool) -> None:
        super().__init__(ErrorCode.INTERNAL, f"the engine: {message}")
        self.started = started
