"""What ``Client`` and ``AsyncClient`` share: settings, and all steps that wait for nothing."""

import secrets
import time
from collections.abc import Iterable, Mapping
from typing import Any, cast

from pydantic import BaseModel

from blipq.client.unserved import Unserved
from blipq.client.waiting import Waiting
from blipq.contract import (
    Asks,
    EmbedDtype,
    EmbedMode,
    IndexEntry,
    OptionFields,
    Options,
    Request,
    ResultT,
)
from blipq.errors import InvalidRequest
from blipq.ledger.codec import check_tenant
from blipq.redis.cells import is_clients
from blipq.settings import Settings
from blipq.submission import ImageSource, Submission, check_names, checked, uploadable


class Fields(OptionFields, total=False):
    """What a verb takes beside its request: the options, and whose job it is."""

    tenant: str | None


class ClientBase:
    """Base of the clients. Raises InvalidRequest for overrides that are no settings."""

    def __init__(self, settings: Settings | None, overrides: Mapping[str, Any]) -> None:
        check_names(overrides, [*Settings.model_fields])
        self.settings = settings or checked(Settings, **overrides)
        self._id = secrets.token_hex(8)
        self._unserved = Unserved()

    def _source(self, image: ImageSource | None) -> str | bytes | None:
        """What of an image must be uploaded, if anything. Raises InvalidRequest for a path."""
        return uploadable(image, local_paths=self.settings.local_paths)

    def _tenant(self, given: str | None) -> str | None:
        """The tenant of a call's jobs: the one given, or that of the settings."""
        return self.settings.tenant if given is None else given

    def _submission(
        self, request: Asks[Any], options: Options, id: str, tenant: str | None
    ) -> Submission:
        """A request as a job of the tenant that is given, or of the usual one."""
        if not isinstance(request, BaseModel):
            given = type(request).__name__
            raise InvalidRequest(f"request: a CaptionRequest or another is expected, not {given}")
        return Submission(cast(Request, request), options, id, self._tenant(tenant))

    def _check_cell(
        self, request: Asks[Any] | Submission, options: Options, id: str | None
    ) -> None:
        """Raises InvalidRequest where another cell than that of the submit may have the job."""
        if isinstance(request, Submission):
            options, id = request.options, request.id
        has_key = options.idempotency_key is not None
        if self.settings.cell is not None and (id is not None or has_key):
            raise InvalidRequest(
                "BLIPQ_CELL: a job with an id of its own or an idempotency key is recorded in the "
                "cell that it belongs to: unset it"
            )
        if self.settings.is_fleet and has_key and id is not None and not is_clients(id):
            raise InvalidRequest(
                "with BLIPQ_CELLS, give an id of your own or an idempotency key, not both: each "
                "determines the job's cell"
            )

    def _waiting(self, ids: Iterable[str], timeout: float | None, expires: float | None) -> Waiting:
        """A wait for jobs of which the last expires at ``expires``, if that is known."""
        if expires is None:
            return Waiting(ids, timeout, expire_within=self.settings.default_expires_in)
        return Waiting(ids, timeout, expire_within=expires - time.monotonic())

    def _expiry(self, options: Options | None) -> float | None:
        """When a job that was recorded just now expires; None if its options are not known."""
        if options is None:
            return None
        return time.monotonic() + (options.expires_in or self.settings.default_expires_in)


def options_of(fields: Mapping[str, Any], options: Mapping[str, Any]) -> Options:
    """A verb's options, beside the fields that it has. Raises InvalidRequest."""
    check_names(options, ["image", *fields, *Options.model_fields, "tenant"])
    return checked(Options, **options)


def request_of(
    kind: type[Asks[ResultT]], image: ImageSource | None, fields: Mapping[str, Any]
) -> Asks[ResultT]:
    """A request about an image that is in S3. Raises InvalidRequest."""
    return cast("Asks[ResultT]", checked(cast(Any, kind), image=image, **fields))


def folder_of(tenant: str | None) -> str:
    """The part of the inbox that a tenant's uploads go to."""
    check_tenant(tenant)
    return "" if tenant is None else f"{tenant}/"


def embed_fields(
    image: ImageSource | None,
    text: str | None,
    mode: EmbedMode | None,
    dtype: EmbedDtype,
    index: str | Mapping[str, Any] | IndexEntry | None,
) -> dict[str, Any]:
    """The fields of an EmbedRequest beside its image: what is given decides the mode."""
    if mode is None:
        mode = "image" if text is None else "text" if image is None else "multimodal"
    return {"text": text, "mode": mode, "dtype": dtype, "index": index}
