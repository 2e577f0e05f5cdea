"""How the run of a message ends other than well."""


class JobFailedTask(Exception):
    """Tells Celery that the job failed, so that its monitors show a failed task."""


class HandBack(Exception):
    """The message must go back to its queue: this worker cannot run it now."""
