"""What the jobs of a key of the HTTP door may name: checked at submit, and again by the worker.

The lists are written into the job's record, so that workers need no file of keys.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict

from blipq.contract import ImageRef, Request, split_s3_uri
from blipq.s3.outputs import is_allowed

#: In a list of what is allowed: all of it.
ANY = "*"


@dataclass(frozen=True, slots=True)
class Refusal:
    """A field that names what is not in a list."""

    field: str
    what: str
    list: str

    def __str__(self) -> str:
        return f"{self.field}: {self.what} is not among the {self.list}"


@dataclass(frozen=True, slots=True)
class Named:
    """What a job names beside its request. An output or a webhook of "" is none."""

    model: str
    output: str = ""
    webhook: str = ""


class Rights(BaseModel):
    """Lists of what jobs may name. buckets and outputs hold buckets, or folders: ``bucket/folder``.

    ``*`` is all of a kind.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    models: tuple[str, ...] = ("default",)
    buckets: tuple[str, ...] = ()
    image_hosts: tuple[str, ...] = ()
    indexes: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    webhook_hosts: tuple[str, ...] = ()

    def with_folder(self, folder: str) -> "Rights":
        """These lists, and a folder of the inbox, ``bucket/tenant/``, whose images may be read."""
        lists = {name: getattr(self, name) for name in Rights.model_fields}
        return Rights(**lists | {"buckets": (*self.buckets, folder)})

    @property
    def text(self) -> str | None:
        """The lists as JSON, for a job's record; None if everything is allowed."""
        if all(ANY in getattr(self, name) for name in Rights.model_fields):
            return None
        return self.model_dump_json(exclude_defaults=True)

    def refusal(self, request: Request, named: Named) -> Refusal | None:
        """What a job may not name, or None."""
        index = getattr(request, "index", None)
        index = getattr(index, "name", index)
        return (
            _of_name("options.model", named.model, self.models, "models")
            or (None if request.image is None else self.of_image(request.image))
            or (None if index is None else _of_name("index", index, self.indexes, "indexes"))
            or self._of_output(named.output)
            or _of_host("options.webhook", named.webhook, self.webhook_hosts, "webhook_hosts")
        )

    def of_image(self, image: ImageRef, field: str = "image") -> Refusal | None:
        """Why an image may not be read, or None."""
        if image.in_s3:
            return _of_place(field, image.bucket, image.key, self.buckets, "buckets")
        return _of_host(field, image.uri, self.image_hosts, "image_hosts")

    def _of_output(self, uri: str) -> Refusal | None:
        if not uri:
            return None
        return _of_place("options.output", *split_s3_uri(uri), self.outputs, "outputs")


def _of_place(
    field: str, bucket: str, key: str, allowed: Sequence[str], names: str
) -> Refusal | None:
    if ANY in allowed or (allowed and is_allowed(bucket, key, allowed)):
        return None
    return Refusal(field, f"s3://{bucket}/{key}", names)


def _of_host(field: str, url: str, allowed: Sequence[str], names: str) -> Refusal | None:
    return _of_name(field, urlsplit(url).hostname or "", allowed, names) if url else None


def _of_name(field: str, name: str, allowed: Sequence[str], names: str) -> Refusal | None:
    return None if ANY in allowed or name in allowed else Refusal(field, name, names)
