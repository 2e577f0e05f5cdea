"""What a worker's processes get in their environment, and how they are started."""

import os
import sys
from collections.abc import Mapping, Sequence

from pydantic import AliasChoices

from blipq.backoff import Backoff
from blipq.local.supervisor import Service
from blipq.settings import Settings
from blipq_worker.catalog.models import served_model
from blipq_worker.catalog.s3.keys import PREFIX, environment_of, model_settings
from blipq_worker.catalog.s3.places import is_in_s3
from blipq_worker.process.privacy import is_of_models
from blipq_worker.settings import WorkerSettings
from blipq_worker.supervision.folder import RunFolder

#: Starts a process of this worker.
COMMAND = (sys.executable, "-P", "-m", "blipq_worker")

#: Of a front, which loads nothing that takes long: pictures may end one after another.
_RESTARTS = Backoff(0.5, 4.0)

_AWS = "AWS_"
_PREFIXES = (_AWS, "CELERY_", "REDIS_")
#: Where a local stack wrote its endpoints, and where fronts count.
_STACK_FILE = "BLIPQ_STACK_FILE"
_NAMES = (_STACK_FILE, "PROMETHEUS_MULTIPROC_DIR")
#: Variables by which S3 is reached, and that are no keys.
_AWS_PLACES = (
    *("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_DEFAULT_REGION"),
    *("AWS_CA_BUNDLE", "AWS_REQUEST_CHECKSUM_CALCULATION", "AWS_RESPONSE_CHECKSUM_VALIDATION"),
)


def engine_service(
    folder: RunFolder, models: Mapping[str, str], command: Sequence[str] = COMMAND
) -> Service:
    """The engine's process, not started. It knows no Redis, and S3 for its models alone.

    models: as WorkerSettings has them. Raises InvalidRequest.
    """
    arguments = [*command, "engine", "--run", str(folder.path)]
    return Service("engine", arguments, env=engine_environment(models), inherits=False)


def front_service(
    folder: RunFolder, number: int, of: int, worker: str, command: Sequence[str] = COMMAND
) -> Service:
    """The process of a front, not started. number: from 1 on."""
    place = ["--number", str(number), "--of", str(of), "--worker", worker]
    arguments = [*command, "front", "--run", str(folder.path), *place]
    return Service(
        f"front {number}", arguments, env=front_environment(), inherits=False, restarts=_RESTARTS
    )


def engine_environment(models: Mapping[str, str]) -> dict[str, str]:
    """The environment of this process without what reaches the services: no address, no key.

    Where a model is in S3, with what reads it. Raises InvalidRequest.
    """
    # Settings are read whatever the case of their names.
    kept = {name: value for name, value in os.environ.items() if not _is_of_services(name.upper())}
    return kept | (_for_models_in_s3() if _has_one_in_s3(models) else {})


def front_environment() -> dict[str, str]:
    """The environment of this process without the keys of models: a front loads none."""
    return {name: value for name, value in os.environ.items() if not is_of_models(name)}


def _has_one_in_s3(models: Mapping[str, str]) -> bool:
    served = [served_model(name, what) for name, what in models.items()]
    return any(is_in_s3(each.generation) or is_in_s3(each.retrieval or "") for each in served)


def _for_models_in_s3() -> dict[str, str]:
    """What the engine reads models with: keys where there are any, else AWS's own ways to some."""
    settings = model_settings()
    aws = {name: value for name, value in os.environ.items() if name.upper().startswith(_AWS)}
    if settings.s3_access_key_id is not None:
        aws = {name: value for name, value in aws.items() if name.upper() in _AWS_PLACES}
    # What a local stack had to say of S3 is in the settings already.
    return {**aws, **environment_of(settings), _STACK_FILE: os.devnull}


def _is_of_services(name: str) -> bool:
    of_services = name.startswith(_PREFIXES) or name in _NAMES or name in _of_settings()
    return of_services or name.startswith(PREFIX)


def _of_settings() -> set[str]:
    """Variables of settings that the model does not need."""
    names = {f"BLIPQ_{name.upper()}" for name in Settings.model_fields}
    for field in Settings.model_fields.values():
        if isinstance(field.validation_alias, AliasChoices):
            names |= {each for each in field.validation_alias.choices if isinstance(each, str)}
    return names - {f"BLIPQ_{name.upper()}" for name in WorkerSettings.model_fields}
