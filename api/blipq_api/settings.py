"""The HTTP door's own options, beside those it shares with producers."""

import ipaddress
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic_settings import NoDecode

from blipq.settings import Settings, checked_endpoint_url


def _parts(value: object) -> object:
    return value.replace(",", " ").split() if isinstance(value, str) else value


_Texts = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_parts)]


def _checked_networks(networks: tuple[str, ...]) -> tuple[str, ...]:
    for each in networks:
        ipaddress.ip_network(each)
    return networks


class ApiSettings(Settings):
    """Options of ``blipq api``."""

    api_keys: Path | None = Field(
        default=None,
        description=(
            "File with the keys of the HTTP door (`blipq api keys new`), read again when it "
            "changes. Without one the door serves this machine alone, and whoever is on it."
        ),
    )
    api_hosts: _Texts = Field(
        default=(),
        description=(
            "Names beside localhost by which a door without keys may be addressed; other Host "
            "headers are refused."
        ),
    )
    api_origins: _Texts = Field(
        default=(),
        description="Origins, such as `https://app.example.org`, whose pages may call the door.",
    )
    api_trusted_proxies: Annotated[_Texts, AfterValidator(_checked_networks)] = Field(
        default=(),
        description="Addresses and networks of proxies whose X-Forwarded headers are believed.",
    )
    api_rate: float = Field(
        default=100.0,
        gt=0,
        description="Requests a second of one key, where the file of keys sets no `rate`.",
    )
    api_concurrency: int = Field(
        default=4096, ge=1, description="Requests that one door answers at the same time."
    )
    api_drain_s: float = Field(
        default=20.0, gt=0, description="Longest a door that stops waits for its answers."
    )
    s3_public_endpoint_url: Annotated[str | None, AfterValidator(checked_endpoint_url)] = Field(
        default=None,
        repr=False,
        description=(
            "S3 endpoint as the door's callers reach it, for presigned uploads; by default the "
            "door's own."
        ),
    )
