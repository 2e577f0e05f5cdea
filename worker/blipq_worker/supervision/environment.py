"""What a worker's processes get in their environment, and how they are started."""

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence

from pydantic import AliasChoices

from blipq.backoff import Backoff
from blipq.errors import InvalidRequest
from blipq.local.supervisor import Service
from blipq.settings import Settings, cache_folder
from blipq_worker.catalog.models import served_model
from blipq_worker.catalog.s3.keys import PREFIX, environment_of, model_settings
from blipq_worker.catalog.s3.places import is_in_s3
from blipq_worker.fronts.user import SETTING, FrontUser
from blipq_worker.process.privacy import is_of_models
from blipq_worker.settings import WorkerSettings
from blipq_worker.supervision.folder import RunFolder

#: Starts a process of this worker.
COMMAND = (sys.executable, "-P", "-m", "blipq_worker")

#: Of a front, which loads nothing that takes long: pictures may end one after another.
_RESTARTS = Backoff(0.5, 4.0)

#: Longest that a trial of a front takes: it imports.
_TRIAL_S = 120.0

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
#: Variables that say whose a process is, and where its files are.
_OF_USER = ("HOME", "USER", "LOGNAME", "USERNAME", "MAIL")
#: Where torch keeps compiled code, by default at a path in /tmp that anybody could make first.
_COMPILED = "TORCHINDUCTOR_CACHE_DIR"


def engine_service(
    folder: RunFolder,
    models: Mapping[str, str],
    command: Sequence[str] = COMMAND,
    user: FrontUser | None = None,
) -> Service:
    """The engine's process, not started. It knows no Redis, and S3 for its models alone.

    models: as WorkerSettings has them. user: whose the fronts are, if not this one's. Raises
    InvalidRequest.
    """
    arguments = [*command, "engine", "--run", str(folder.path)]
    environment = engine_environment(models)
    if user is not None:
        environment.setdefault(_COMPILED, str(cache_folder() / "inductor"))
    return Service("engine", arguments, env=environment, inherits=False)


def front_service(
    folder: RunFolder,
    number: int,
    of: int,
    worker: str,
    command: Sequence[str] = COMMAND,
    *,
    environment: Mapping[str, str] | None = None,
    user: FrontUser | None = None,
) -> Service:
    """The process of a front, not started. number: from 1 on.

    environment: by default ``front_environment``. user: whose it is, if not this one's.
    """
    return Service(
        f"front {number}",
        [*command, "front", *_seat(folder, number, of, worker)],
        env=front_environment() if environment is None else environment,
        inherits=False,
        restarts=_RESTARTS,
        identity=None if user is None else user.identity,
    )


def require_front(
    folder: RunFolder,
    worker: str,
    command: Sequence[str],
    environment: Mapping[str, str],
    user: FrontUser,
) -> None:
    """Raises InvalidRequest where a user cannot run a front, or could do more than a front should.

    An installation in root's home is closed to all others, for example: each front would end as it
    starts. Says so in one line.
    """
    uid, gid, groups = user.identity
    try:
        folder.prepare(1)
        subprocess.run(
            [*command, "front", *_seat(folder, 1, 1, worker), "--trial"],
            user=uid,
            group=gid,
            extra_groups=groups,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            check=True,
            timeout=_TRIAL_S,
        )
    except subprocess.CalledProcessError as error:
        why = error.stderr.strip().rpartition("\n")[2] or f"code {error.returncode}"
        raise InvalidRequest(f"{SETTING}={user.named} cannot run a front: {why}") from None
    except (OSError, subprocess.SubprocessError) as error:
        raise InvalidRequest(f"{SETTING}={user.named} cannot run a front: {error}") from error


def _seat(folder: RunFolder, number: int, of: int, worker: str) -> list[str]:
    place = ["--number", str(number), "--of", str(of), "--worker", worker]
    return ["--run", str(folder.path), *place]


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


def environment_of_user(
    user: FrontUser, settings: Settings, outputs: Sequence[str]
) -> dict[str, str]:
    """The environment of fronts of another user. outputs: where ``output`` may go.

    What a local stack says of itself is in a home that they cannot read.
    """
    kept = {
        name: value
        for name, value in front_environment().items()
        if name not in _OF_USER and not name.startswith("XDG_")
    }
    if settings.endpoint_source == "local stack":
        secret = settings.s3_secret_access_key
        found = {
            "REDIS_URL": settings.redis_url,
            "S3_ENDPOINT_URL": settings.s3_endpoint_url,
            "S3_ACCESS_KEY_ID": settings.s3_access_key_id,
            "S3_SECRET_ACCESS_KEY": secret.get_secret_value() if secret else None,
            "ALLOWED_OUTPUTS": ",".join(outputs),
            "STACK_FILE": os.devnull,
        }
        kept |= {f"BLIPQ_{name}": value for name, value in found.items() if value}
    return kept | user.environment


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
