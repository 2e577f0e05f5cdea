"""Writes docs/configuration.md from the settings: ``python -m tools.docs.configuration``."""

import sys
from collections.abc import Iterator, Set
from datetime import timedelta
from typing import Any

from pydantic import SecretStr
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined
from pydantic_settings import BaseSettings
from tools.docs import DOCS, write_or_check

from blipq import Settings
from blipq_api.settings import ApiSettings
from blipq_worker.catalog.s3.keys import ModelS3Settings
from blipq_worker.settings import WorkerSettings

PAGE = DOCS / "configuration.md"
HIDDEN = {"endpoint_source"}

HEAD = """\
# Configuration

<!-- Written by `python -m tools.docs.configuration`. Change the settings, not this page. -->

Every option is an environment variable. A service can also give those of the first table to
`Client(redis_url=..., ...)`, in lower case and without the prefix. `blipq doctor` shows which
endpoints are used, and whether they are fit for use.

Durations are seconds, or text such as `500ms`, `90s`, `10m`, `2h` or `7d`. Lists are separated by
commas.

Where Redis and S3 are is found in this order:

1. `BLIPQ_*` variables. One of `BLIPQ_REDIS_URL`, `BLIPQ_BROKER_URL`, `BLIPQ_CELLS`,
   `BLIPQ_S3_ENDPOINT_URL`, `BLIPQ_S3_ACCESS_KEY_ID` or `BLIPQ_S3_SECRET_ACCESS_KEY` switches the
   next step off.
2. A local stack that `blipq up` runs on this machine.
3. The defaults below, which for S3 are AWS's own variables, files and roles.
"""

TAIL = """\
## Variables of others that count

| variable | what it does here |
|---|---|
| `AWS_ENDPOINT_URL_S3` | S3 endpoint where `BLIPQ_S3_ENDPOINT_URL` is not set |
| `AWS_ACCESS_KEY_ID`, `AWS_PROFILE`, ... | credentials where `BLIPQ_S3_*` has none |
| `CUDA_VISIBLE_DEVICES` | GPUs that workers may use; `blipq worker --gpus` gives each one of them |
| `HF_HOME`, `HF_HUB_CACHE` | where downloaded weights are kept |
| `HF_HUB_OFFLINE` | `1`: never call the hub |
| `OMP_NUM_THREADS` | CPU threads of a model on a CPU; `blipq worker --processes` sets it |
| `XDG_CACHE_HOME` | where the local stack keeps its data: `$XDG_CACHE_HOME/blipq` |
| `BLIPQ_STACK_FILE` | the file by which clients find the local stack |
| `BLIPQ_LOG_LEVEL` | level of the worker's log, by default `INFO` |
| `BLIPQ_LOG_FORMAT` | by default `text`; `json`: an object a line, with the job and its trace |
| `OTEL_EXPORTER_OTLP_ENDPOINT`, `OTEL_TRACES_SAMPLER`, ... | traces: see [Traces](tracing.md) |
"""


def page() -> str:
    """The whole page."""
    return "\n".join(
        [
            HEAD,
            "## Producers and workers\n",
            *_table(Settings),
            "\n## Workers only\n",
            *_table(WorkerSettings),
            "\n## Models in S3, for workers only\n",
            *_table(ModelS3Settings),
            "\n## The HTTP door only\n",
            *_table(ApiSettings, but={*Settings.model_fields}),
            "",
            TAIL,
        ]
    )


def _table(settings: type[BaseSettings], but: Set[str] = frozenset()) -> Iterator[str]:
    yield "| variable | default | meaning |"
    yield "|---|---|---|"
    for name, field in settings.model_fields.items():
        if name not in HIDDEN | but:
            variable = f"`BLIPQ_{name.upper()}`"
            yield f"| {variable} | {_default(name, field)} | {_meaning(field)} |"


def _meaning(field: FieldInfo) -> str:
    text = field.description or ""
    alias: Any = field.validation_alias
    others = [f"`{each}`" for each in getattr(alias, "choices", ())[1:]]
    return f"{text} Also read from {' and '.join(others)}." if others else text


def _default(name: str, field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True)
    if value is PydanticUndefined:
        return "required"
    if value is None or value in ((), {}) or isinstance(value, SecretStr):
        return ""
    if isinstance(value, bool):
        return f"`{int(value)}`"
    if isinstance(value, dict):
        return f"`{','.join(f'{key}={what}' for key, what in value.items())}`"
    if isinstance(value, tuple):
        return f"`{','.join(map(str, value))}`"
    if isinstance(value, float) and value >= 3600:
        return f"`{value:.0f}` ({_readable(value)})"
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


def _readable(seconds: float) -> str:
    days, hours = divmod(timedelta(seconds=seconds), timedelta(days=1))
    return f"{days} days" if days > 1 else f"{int((days * 24) + hours.total_seconds() / 3600)} h"


if __name__ == "__main__":
    sys.exit(write_or_check({PAGE: page()}, "tools.docs.configuration"))
