"""rules.toml: which objects become which jobs. Checked whole before anything is watched."""

import fnmatch
import functools
import re
import string
import tomllib
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ByteSize,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from blipq.contract import (
    Name,
    Options,
    Request,
    Seconds,
    checked_bucket,
    heat_map_place,
    request_adapter,
)
from blipq.errors import InvalidRequest
from blipq.submission import checked, explain
from blipq.watch.objects import Upload

_SIZE = re.compile(r"\s*\d+(\.\d+)?\s*([kMGT]?i?B)?\s*", re.IGNORECASE)


def _one_size(value: Any) -> Any:
    """ByteSize would read "20 MB or so" as 20 MB, and "1.2.3 MB" as one byte."""
    if isinstance(value, str) and not _SIZE.fullmatch(value):
        raise ValueError(f"{value!r} is not a size such as 20000, '500 kB' or '20 MiB'")
    return value


def _one_or_many(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


def _lower(value: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(each.lower() for each in value)


def _checked_queue(url: str) -> str:
    if re.match(r"https?://[^/]+/.+", url) is None:
        raise ValueError("a queue is the URL that SQS gives it: https://HOST/ACCOUNT/NAME")
    return url


ByteCount = Annotated[ByteSize, BeforeValidator(_one_size)]
#: One or many texts whose case does not matter.
Endings = Annotated[tuple[str, ...], BeforeValidator(_one_or_many), AfterValidator(_lower)]


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Rule(_Table):
    """Objects of a bucket, and the job that each of them becomes.

    ``options`` are those of every job; ``output`` and the values of ``metadata`` are templates.
    """

    name: Name
    bucket: Annotated[str, AfterValidator(checked_bucket)]
    prefix: str = ""
    suffix: Endings = ()
    content_type: Endings = ()
    min_size: ByteCount = ByteSize(1)
    max_size: ByteCount | None = None
    request: dict[str, Any]
    options: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _makes_a_job(self) -> "Rule":
        if "image" in self.request:
            raise ValueError("request.image: leave it out: it is the upload")
        if "idempotency_key" in self.options:
            raise ValueError("options.idempotency_key: leave it out: each upload has its own")
        try:
            _, options = self.job(self.sample, watch="sample")
        except InvalidRequest as error:
            raise ValueError(str(error)) from None
        if options.output == self.sample.uri:
            raise ValueError("options.output: it would replace the upload itself")
        return self

    @property
    def sample(self) -> Upload:
        """An upload that the rule would take, for what can be known before there is one."""
        return Upload(self.bucket, self.prefix + "sample.jpg", "etag", 1, datetime.now(UTC))

    @property
    def output(self) -> str | None:
        """Template of the sidecar's place."""
        return self.options.get("output")

    def may_take(self, bucket: str, key: str) -> bool:
        """Whether it is worth asking S3 about this object."""
        if bucket != self.bucket or not key.startswith(self.prefix) or key.endswith("/"):
            return False
        return not self.suffix or key.lower().endswith(self.suffix)

    def takes(self, upload: Upload) -> bool:
        """Whether an upload becomes a job."""
        largest = self.max_size if self.max_size is not None else upload.size
        return (
            self.may_take(upload.bucket, upload.key)
            and self.min_size <= upload.size <= largest
            and self._has_type(upload.content_type)
        )

    def _has_type(self, content_type: str | None) -> bool:
        if not self.content_type:
            return True
        bare = (content_type or "").partition(";")[0].strip().lower()
        return any(fnmatch.fnmatchcase(bare, each) for each in self.content_type)

    def job(self, upload: Upload, *, watch: str) -> tuple[Request, Options]:
        """The upload's job: one for each version, rule and watch. Raises InvalidRequest."""
        fields = {**self.request, "image": upload.reference}
        try:
            request = request_adapter.validate_python(fields)
        except ValidationError as error:
            told = explain(error, Request)  # of the whole it begins so already
            raise InvalidRequest(f"request.{told.removeprefix('request: ')}") from None
        return request, self._options(upload, f"watch:{watch}:{self.name}:{upload.identity}")

    def _options(self, upload: Upload, key: str) -> Options:
        fields = templated(self.options, upload)
        try:
            return checked(Options, **fields, idempotency_key=key)
        except InvalidRequest as error:
            raise InvalidRequest(f"options.{error}") from None


class Source(_Table):
    """Where news of uploads comes from: an SQS queue, or listings of the rules' buckets.

    ``every``: pause between two listings. ``overlap``: how much older than the last listing an
    object may be that only this one shows. ``state``: ``redis``, or a file that keeps the cursor.
    """

    queue: Annotated[str, AfterValidator(_checked_queue)] | None = None
    visibility: Annotated[Seconds, Field(ge=10, le=43200)] = 60.0
    every: Annotated[Seconds, Field(ge=0.1)] = 10.0
    overlap: Annotated[Seconds, Field(ge=0)] = 600.0
    state: Literal["redis"] | Path = "redis"


class Rules(_Table):
    """The whole file. Its ``name`` keeps its cursor and jobs apart from those of other files."""

    name: Name
    source: Source = Source()
    rules: Annotated[tuple[Rule, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _names_differ(self) -> "Rules":
        names = [rule.name for rule in self.rules]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"two rules have the name {sorted(twice)[0]!r}")
        return self

    @property
    def places(self) -> list[tuple[str, str]]:
        """Buckets and prefixes to list, none of them inside another."""
        places = sorted({(rule.bucket, rule.prefix) for rule in self.rules})
        return [
            (bucket, prefix)
            for bucket, prefix in places
            if not any(
                bucket == other and prefix != outer and prefix.startswith(outer)
                for other, outer in places
            )
        ]

    @property
    def need_types(self) -> bool:
        """Whether a rule needs the content type, which listings do not have."""
        return any(rule.content_type for rule in self.rules)

    def may_take(self, bucket: str, key: str) -> bool:
        """Whether a rule could take this object, which is no sidecar of ours."""
        return not self.is_sidecar(bucket, key) and any(
            rule.may_take(bucket, key) for rule in self.rules
        )

    def is_sidecar(self, bucket: str, key: str) -> bool:
        """Whether a rule writes its results, or heat maps beside them, to places of this form."""
        uri = f"s3://{bucket}/{key}"
        outputs = [rule.output for rule in self.rules if rule.output]
        places = (*outputs, *map(heat_map_place, outputs))
        return any(_pattern(place).fullmatch(uri) for place in places)


def load(path: Path) -> Rules:
    """Reads a file of rules. Raises InvalidRequest, which names the line or the field."""
    try:
        return Rules.model_validate(tomllib.loads(path.read_text("utf-8-sig")))
    except OSError as error:
        raise InvalidRequest(f"cannot read {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"{path} is no TOML: {error}") from None
    except ValidationError as error:
        raise InvalidRequest(f"{path}: {explain(error, Rules)}") from None


def templated(options: Mapping[str, Any], upload: Upload) -> dict[str, Any]:
    """Options of an upload's job, where ``output`` and the values of ``metadata`` are templates.

    ``webhook`` may be a URL alone. Raises InvalidRequest for a template; the rest is not checked.
    """
    fields = dict(options)
    if isinstance(output := fields.get("output"), str):
        fields["output"] = rendered(output, upload)
    if isinstance(metadata := fields.get("metadata"), dict):
        fields["metadata"] = {name: rendered(str(text), upload) for name, text in metadata.items()}
    if isinstance(webhook := fields.get("webhook"), str):
        fields["webhook"] = {"url": webhook}
    return fields


def rendered(template: str, upload: Upload) -> str:
    """A template with an upload's fields in it. Raises InvalidRequest."""
    folder, slash, name = upload.key.rpartition("/")
    stem = name.rpartition(".")[0] or name
    fields = {
        "bucket": upload.bucket,
        "key": upload.key,
        "name": name,
        "stem": f"{folder}{slash}{stem}",
        "etag": upload.etag,
        "version_id": upload.version_id or "null",
    }
    try:
        return template.format_map(fields)
    except KeyError as error:
        known = ", ".join(fields)
        raise InvalidRequest(f"{template!r}: {error} is not one of {known}") from None
    except (ValueError, IndexError, AttributeError, TypeError) as error:
        raise InvalidRequest(f"{template!r}: {error}; write {{{{ for a brace") from None


@functools.cache
def _pattern(template: str) -> re.Pattern[str]:
    """What a template's texts look like: its literals, with any text between each two.

    In between the first place of a literal is as good as any (as in ``fnmatch``), and no other is
    tried: whoever uploads chooses the key, which must not take minutes.
    """
    literals = [""]
    for literal, name, _, _ in string.Formatter().parse(template):
        literals[-1] += re.escape(literal)
        literals += [""] if name else []
    first, *others = literals
    inner = "".join(f"(?>.+?{literal})" for literal in others[:-1])
    last = f".+{others[-1]}" if others else ""
    return re.compile(first + inner + last, re.DOTALL)
