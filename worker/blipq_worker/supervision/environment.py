"""What a worker's processes get in their environment, and how they are started."""

import os
import sys
from collections.abc import Sequence

from pydantic import AliasChoices

from blipq.backoff import Backoff
from blipq.local.supervisor import Service
from blipq.settings import Settings
from blipq_worker.settings import WorkerSettings
from blipq_worker.supervision.folder import RunFolder

#: Starts a process of this worker.
COMMAND = (sys.executable, "-m", "blipq_worker")

#: Of a front, which loads nothing that takes long: pictures may end one after another.
_RESTARTS = Backoff(0.5, 4.0)

_PREFIXES = ("AWS_", "CELERY_", "REDIS_")
#: Where a local stack wrote its endpoints, and where fronts count.
_NAMES = ("BLIPQ_STACK_FILE", "PROMETHEUS_MULTIPROC_DIR")


def engine_service(folder: RunFolder, command: Sequence[str] = COMMAND) -> Service:
    """The engine's process, not started. It knows no Redis and no S3, and none of their keys."""
    arguments = [*command, "engine", "--run", str(folder.path)]
    return Service("engine", arguments, env=engine_environment(), inherits=False)


def front_service(
    folder: RunFolder, number: int, of: int, worker: str, command: Sequence[str] = COMMAND
) -> Service:
    """The process of a front, not started. number: from 1 on."""
    place = ["--number", str(number), "--of", str(of), "--worker", worker]
    arguments = [*command, "front", "--run", str(folder.path), *place]
    return Service(f"front {number}", arguments, restarts=_RESTARTS)


def engine_environment() -> dict[str, str]:
    """The environment of this process without what reaches the services: no address, no key."""
    # Settings are read whatever the case of their names.
    return {name: value for name, value in os.environ.items() if not _is_of_services(name.upper())}


def _is_of_services(name: str) -> bool:
    return name.startswith(_PREFIXES) or name in _NAMES or name in _of_settings()


def _of_settings() -> set[str]:
    """Variables of settings that the model does not need."""
    names = {f"BLIPQ_{name.upper()}" for name in Settings.model_fields}
    for field in Settings.model_fields.values():
        if isinstance(field.validation_alias, AliasChoices):
            names |= {each for each in field.validation_alias.choices if isinstance(each, str)}
    return names - {f"BLIPQ_{name.upper()}" for name in WorkerSettings.model_fields}
