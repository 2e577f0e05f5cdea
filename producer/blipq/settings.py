"""Every option that producers and workers share, declared once.

A setting is read from ``BLIPQ_<NAME>``. Where Redis and S3 are is found in this order: explicit
``BLIPQ_*`` variables; a running local stack (``blipq up``); the defaults, which for S3 are AWS's
own variables. A machine with a local stack therefore never sends a local photo to a live account.
"""

import base64
import json
import os
from pathlib import Path
from typing import Annotated, Any, Self
from urllib.parse import quote, urlsplit

from pydantic import (
    AfterValidator,
    AliasChoices,
    BeforeValidator,
    Field,
    SecretStr,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_settings import (
    BaseSettings,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from blipq.contract import Name, Seconds, checked_bucket
from blipq.errors import InvalidRequest
from blipq.program import blipq
from blipq.redaction import place_of
from blipq.redis.cells import Cells, named_urls, versioned_lists
from blipq.redis.url import RedisUrl, take_apart, tls_of
from blipq.ssrf.policy import Policy

#: Options that say where the services are. One of them set by hand switches discovery off.
CONNECTION_FIELDS = (
    "redis_url",
    "broker_url",
    "cells",
    "s3_endpoint_url",
    "s3_access_key_id",
    "s3_secret_access_key",
)


def cache_folder() -> Path:
    """The user's cache folder for blipq. Raises InvalidRequest where the user has no home."""
    root = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if root.startswith("~"):  # a container's user may be a number without a name and a home
        raise InvalidRequest("this user has no home folder: set HOME or XDG_CACHE_HOME")
    return Path(root) / "blipq"


def stack_file() -> Path:
    """The file in which a running local stack publishes its addresses."""
    override = os.environ.get("BLIPQ_STACK_FILE")
    return Path(override) if override else cache_folder() / "stack.json"


def born(pid: int) -> str | None:
    """When a process started, where the system reports it: pids are used again."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None


def read_stack_file() -> dict[str, Any] | None:
    """What the local stack wrote, if its process still lives."""
    try:
        stack: dict[str, Any] = json.loads(stack_file().read_text())
        os.kill(int(stack["pid"]), 0)
        if stack.get("born") not in (None, born(stack["pid"])):
            return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return stack


def _parts(value: Any) -> Any:
    return value.replace(",", " ").split() if isinstance(value, str) else value


def _stripped(value: Any) -> Any:
    """A text without the line end that a file or a secret's store leaves behind it."""
    return value.strip() if isinstance(value, str) else value


def _checked_secret(secret: SecretStr) -> SecretStr:
    """``whsec_`` and 24 to 64 bytes in base64, as receivers' libraries read it."""
    prefix, _, text = secret.get_secret_value().partition("_")
    try:
        size = len(base64.b64decode(text, validate=True))
    except ValueError:
        size = 0
    if prefix != "whsec" or not 24 <= size <= 64:
        raise ValueError(
            f"a secret is whsec_ and 24 to 64 bytes in base64: {blipq('webhooks secret new')}"
        )
    return secret


def _checked_ladder(ladder: tuple[float, ...]) -> tuple[float, ...]:
    if ladder[0] != 0:
        raise ValueError("the first attempt is made at once: start with 0")
    return ladder


class _LocalStack(PydanticBaseSettingsSource):
    """Settings of the running local stack, unless a service was named by hand."""

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        raise NotImplementedError  # __call__ answers for all fields at once

    def __call__(self) -> dict[str, Any]:
        named = set(self.current_state).intersection(CONNECTION_FIELDS)
        stack = None if named else read_stack_file()
        return {} if stack is None else {**stack["settings"], "endpoint_source": "local stack"}


def _checked_redis_url(url: str) -> str:
    RedisUrl.of(url)
    return url


def _checked_broker_url(url: str | None) -> str | None:
    """Of Redis all is checked; of other brokers that nothing is cut off and who is verified."""
    if url is not None:
        tls_of(url)
    return url


def _checked_cells(urls: dict[str, str]) -> dict[str, str]:
    for url in urls.values():
        RedisUrl.of(url)
    if len(set(urls.values())) < len(urls):
        raise ValueError("two cells have the same URL")
    return urls


def _checked_place(place: str) -> str:
    if place.startswith("s3://"):
        checked_bucket(place.removeprefix("s3://").partition("/")[0])
    elif not place.startswith((".", "/", "~")):
        raise ValueError("s3://bucket/prefix is expected, or a folder: ./indexes, /data/indexes")
    return place


def checked_endpoint_url(url: str | None) -> str | None:
    """An endpoint of S3 or SQS. Raises ValueError, which repeats no password."""
    if url is None:
        return None
    url = url.strip()  # as of a file's last line
    if url.partition("://")[0].lower() not in ("http", "https"):
        raise ValueError("it begins with http:// or https://")
    take_apart(url)
    try:
        parts = urlsplit(url)
        has_place = bool(parts.hostname) and parts.port != 0  # a port that is none raises
    except ValueError:
        has_place = False
    if not has_place:
        raise ValueError("an endpoint is http:// or https:// and a host, and a port where need be")
    return url


class Settings(BaseSettings):
    """Options of producers and workers alike."""

    model_config = SettingsConfigDict(
        env_prefix="BLIPQ_",
        extra="ignore",
        frozen=True,
        populate_by_name=True,
        hide_input_in_errors=True,  # it may be a password
    )

    redis_url: Annotated[str, AfterValidator(_checked_redis_url)] = Field(
        default="redis://localhost:6379/0",
        repr=False,
        description=(
            "Redis that holds the job records: redis://, rediss:// (TLS), unix://, or "
            "sentinel://:PASSWORD@HOST:PORT,HOST:PORT/0?master=NAME (sentinels:// with TLS). "
            "Percent-encode the password."
        ),
    )
    broker_url: Annotated[str | None, AfterValidator(_checked_broker_url)] = Field(
        default=None,
        repr=False,
        description="Celery broker; by default the same Redis. RabbitMQ and SQS work too.",
    )
    cells: Annotated[
        dict[str, str], NoDecode, BeforeValidator(named_urls), AfterValidator(_checked_cells)
    ] = Field(
        default={},
        repr=False,
        description=(
            "Several Redis servers by name, in place of `BLIPQ_REDIS_URL`: `a=redis://... "
            "b=redis://...`. See [Cells](cells.md)."
        ),
    )
    cell_brokers: Annotated[dict[str, str], NoDecode, BeforeValidator(named_urls)] = Field(
        default={},
        repr=False,
        description="Celery broker of each cell; by default its Redis.",
    )
    cell_lists: Annotated[
        tuple[tuple[int, tuple[str, ...]], ...], NoDecode, BeforeValidator(versioned_lists)
    ] = Field(
        default=(),
        description=(
            "Which cells take new jobs, by version: `1=a,b 2=a,b,c`. The last list is in force; "
            "earlier ones stay for one retention after a change. Needed with more cells than one."
        ),
    )
    cell: str | None = Field(
        default=None,
        description=(
            "The one of `BLIPQ_CELLS` that this process serves: each worker names it. With it "
            "senders and commands are for that cell alone; clients leave it unset."
        ),
    )
    s3_endpoint_url: Annotated[str | None, AfterValidator(checked_endpoint_url)] = Field(
        default=None,
        repr=False,
        description="S3 endpoint; by default AWS_ENDPOINT_URL_S3, then AWS itself.",
    )
    s3_access_key_id: Annotated[str | None, BeforeValidator(_stripped)] = Field(
        default=None, description="S3 access key; by default AWS's credential chain."
    )
    s3_secret_access_key: Annotated[SecretStr | None, BeforeValidator(_stripped)] = Field(
        default=None, description="S3 secret key; by default AWS's credential chain."
    )
    s3_region: str | None = Field(
        default=None,
        validation_alias=AliasChoices("BLIPQ_S3_REGION", "AWS_REGION", "AWS_DEFAULT_REGION"),
        description="S3 region.",
    )
    inbox_bucket: str = Field(
        default="blipq-inbox", description="Bucket that clients upload local files to."
    )
    inbox_ttl: Seconds = Field(
        default=14 * 86400.0,
        gt=0,
        description=(
            "Age at which the inbox's lifecycle rule deletes, in seconds: an upload that is there "
            "and older than half of it is written anew. At least twice your longest deadline."
        ),
    )
    indexes: Annotated[str, AfterValidator(_checked_place)] = Field(
        default="s3://blipq-indexes",
        description="Where search indexes are: `s3://bucket/prefix`, or a folder.",
    )
    local_paths: bool = Field(
        default=True,
        description=(
            "Whether an image given as a text without :// is a local file to upload. Switch it off "
            "in services that pass on what their users write: Path and bytes still work."
        ),
    )
    endpoint_source: str = Field(
        default="settings", description="Where the endpoints came from; set by discovery."
    )

    timeout_s: Seconds = Field(
        default=3.0,
        gt=0,
        description="Longest a submit, status or cancel waits for Redis before QueueUnavailable.",
    )
    default_expires_in: Seconds = Field(
        default=7 * 86400.0, gt=0, description="Deadline of jobs that name none, in seconds."
    )
    result_ttl: Seconds = Field(
        default=86400.0,
        gt=0,
        description="How long a succeeded, cancelled or expired job is kept, in seconds.",
    )
    failed_ttl: Seconds = Field(
        default=7 * 86400.0, gt=0, description="How long a failed job is kept, in seconds."
    )
    dead_letter_ttl: Seconds = Field(
        default=14 * 86400.0, gt=0, description="How long a dead letter is kept, in seconds."
    )
    keep_delivered: bool = Field(
        default=True,
        description=(
            "Whether a result stays in Redis once its webhook is delivered or its `output` "
            "written. Without, `result_uri` names the output, and one by webhook alone is gone."
        ),
    )
    max_open_jobs: int = Field(
        default=1_000_000, ge=1, description="Open jobs beyond which submit raises QueueFull."
    )
    tenant: Name | None = Field(
        default=None,
        description=(
            "Whose jobs a producer submits where a call names no tenant. The HTTP door takes the "
            "tenant of the key instead."
        ),
    )

    known_models: Annotated[tuple[Name, ...], NoDecode, BeforeValidator(_parts)] = Field(
        default=(),
        description=(
            "Models that jobs may name although no worker has served them in the last 40 days. "
            "Jobs for other names are refused; `default` is always known."
        ),
    )

    window: int = Field(
        default=10_000,
        ge=1,
        description=(
            "Jobs in flight at which `blipq bulk` waits with the next, and open jobs at which "
            "`blipq watch --backfill` does."
        ),
    )

    webhook_secrets: Annotated[
        tuple[Annotated[SecretStr, AfterValidator(_checked_secret)], ...],
        NoDecode,
        BeforeValidator(_parts),
    ] = Field(
        default=(),
        description="Secrets that sign webhooks, the newest first: all of them sign. Sender only.",
    )
    webhook_ladder: Annotated[
        tuple[Annotated[Seconds, Field(ge=0, le=7 * 86400)], ...],
        NoDecode,
        BeforeValidator(_parts),
        AfterValidator(_checked_ladder),
    ] = Field(
        default=(0, 5, 300, 1800, 7200, 18000, 36000, 50400, 72000, 86400),
        min_length=1,
        description="Pauses before each attempt at a webhook, in seconds; then it is given up.",
    )
    webhook_timeout_s: Seconds = Field(
        default=15.0, gt=0, description="Longest a receiver of webhooks may take to answer."
    )
    webhook_allow: Annotated[tuple[str, ...], NoDecode, BeforeValidator(_parts)] = Field(
        default=(),
        description=(
            "Hosts, addresses and networks that webhooks may go to inside, over http and on any "
            "port. For producers and senders alike."
        ),
    )
    webhook_ports: Annotated[tuple[int, ...], NoDecode, BeforeValidator(_parts)] = Field(
        default=(443,), description="Ports that webhooks may go to."
    )
    webhook_concurrency: int = Field(
        default=256, ge=1, description="Webhooks that one sender sends at the same time."
    )
    webhook_host_concurrency: int = Field(
        default=16, ge=1, description="Of these, to one host; to one that timed out, a single one."
    )

    image_allow: Annotated[tuple[str, ...], NoDecode, BeforeValidator(_parts)] = Field(
        default=(),
        description=(
            "Hosts, addresses and networks that images may come from inside, over http and on any "
            "port. For producers and workers alike."
        ),
    )
    image_ports: Annotated[tuple[int, ...], NoDecode, BeforeValidator(_parts)] = Field(
        default=(443,), description="Ports that https images may come from."
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Arguments, then the environment, then the local stack."""
        return init_settings, env_settings, _LocalStack(settings_cls)

    @model_validator(mode="after")
    def _check_cells(self) -> Self:
        if not self.cells:
            if self.cell is not None or self.cell_lists or self.cell_brokers:
                raise ValueError("BLIPQ_CELL and BLIPQ_CELL_* need BLIPQ_CELLS")
            return self
        if len(self.cells) > 1 and not self.cell_lists and self.cell is None:
            raise ValueError("BLIPQ_CELL_LISTS must name the cells that take new jobs: 1=a,b")
        Cells.of(self.cells, self.cell_lists)
        if self.cell_brokers and set(self.cell_brokers) != set(self.cells):
            raise ValueError("BLIPQ_CELL_BROKERS names a broker of each cell, or of none")
        for url in self.cell_brokers.values():
            tls_of(url)
        if self.cell is not None and self.cell not in self.cells:
            raise ValueError(f"BLIPQ_CELL is none of BLIPQ_CELLS: {', '.join(self.cells)}")
        given = {"redis_url": self.redis_url, "broker_url": self.broker_url}
        for name, value in given.items():
            if name in self.model_fields_set and value != self._of_cell.get(name):
                raise ValueError(f"BLIPQ_CELLS is in place of BLIPQ_{name.upper()}: unset one")
        for name, value in self._of_cell.items():  # frozen for others
            object.__setattr__(self, name, value)
        return self

    @property
    def _of_cell(self) -> dict[str, str | None]:
        """What the settings of a process that serves one cell have in place of all of them."""
        if self.cell is None:
            return {}
        return {
            "redis_url": self.cells[self.cell],
            "broker_url": self.cell_brokers.get(self.cell),
        }

    @property
    def is_fleet(self) -> bool:
        """Whether these settings are of several cells, and not of one of them."""
        return bool(self.cells) and self.cell is None

    def in_cell(self, name: str) -> Self:
        """The same settings for one cell."""
        named = self.model_copy(update={"cell": name})
        return named.model_copy(update=named._of_cell)

    @property
    def by_cell(self) -> dict[str, Self]:
        """The settings of each cell by its name; of one Redis, or one cell, these under ""."""
        return {name: self.in_cell(name) for name in self.cells} if self.is_fleet else {"": self}

    @property
    def home(self) -> Self:
        """The settings of the cell that keeps what is of no job: sessions of the console."""
        if not self.is_fleet:
            return self
        return self.in_cell(Cells.of(self.cells, self.cell_lists).current[0])

    @property
    def webhook_policy(self) -> Policy:
        """Which URLs webhooks may go to."""
        return Policy(allow=self.webhook_allow, ports=self.webhook_ports)

    @property
    def image_policy(self) -> Policy:
        """Which URLs images may come from."""
        return Policy(allow=self.image_allow, ports=self.image_ports, options="BLIPQ_IMAGE")

    @property
    def effective_broker_url(self) -> str:
        """The broker Celery connects to."""
        return self.broker_url or self.redis_url

    @property
    def redis_is_broker(self) -> bool:
        """Whether the ledger's Redis is the broker, too."""
        return self.effective_broker_url == self.redis_url

    @property
    def s3_endpoint(self) -> str | None:
        """The S3 endpoint, also where AWS's own variables name it; None is AWS itself."""
        named = self.s3_endpoint_url or os.environ.get("AWS_ENDPOINT_URL_S3")
        return named or os.environ.get("AWS_ENDPOINT_URL")

    @property
    def endpoints(self) -> str:
        """One line with the services that are used, without credentials."""
        s3 = self.s3_endpoint
        urls = self.cells if self.is_fleet else {"": self.redis_url}
        places = {name: place_of(url).removeprefix("redis://") for name, url in urls.items()}
        redis = " ".join(f"{name}={place}" if name else place for name, place in places.items())
        return f"redis {redis}, s3 {place_of(s3) if s3 else 'AWS'} ({self.endpoint_source})"

    @property
    def secrets(self) -> list[str]:
        """Every password and key in these settings, as it is and as URLs write it."""
        brokers = (self.broker_url or "", *self.cell_brokers.values())
        named = (self.redis_url, *self.cells.values(), *";".join(brokers).split(";"))
        urls = [take_apart(each) for each in named if each]
        found = [parts.password for parts in urls]
        found += [parts.query.get("sentinel_password") for parts in urls]
        hidden = [self.s3_secret_access_key, *self.webhook_secrets]
        found += [each.get_secret_value() for each in hidden if each is not None]
        known = [secret for secret in found if secret]
        return [*known, *(quote(secret, safe="") for secret in known)]
