"""References to images in S3, or at URLs."""

import re
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from blipq.contract.base import Input
from blipq.ssrf import policy as guard

_S3_URI = re.compile(r"s3://(?P<bucket>[a-z0-9][a-z0-9.-]{1,61}[a-z0-9])/(?P<key>.+)", re.DOTALL)


def split_s3_uri(uri: str) -> tuple[str, str]:
    """Bucket and key of ``s3://bucket/key``; ValueError says what is wrong with another text."""
    match = _S3_URI.fullmatch(uri)
    if match is None:
        raise ValueError(f"{uri!r} is not of the form s3://bucket/key")
    if len(match["key"].encode()) > 1024:
        raise ValueError("an S3 key has at most 1,024 bytes")
    return match["bucket"], match["key"]


def _checked_s3_uri(uri: str) -> str:
    split_s3_uri(uri)
    return uri


S3Uri = Annotated[str, AfterValidator(_checked_s3_uri)]


def _checked_image_uri(uri: str) -> str:
    if uri.lower().startswith(("https://", "http://")):
        guard.parse(uri)
        return uri
    return _checked_s3_uri(uri)


class ImageRef(Input):
    """An object in S3, or at a public https:// URL.

    With ``etag`` or ``version_id`` (S3 alone) the worker refuses any other bytes.
    """

    uri: Annotated[str, Field(max_length=4096), AfterValidator(_checked_image_uri)]
    version_id: str | None = Field(default=None, max_length=1024)
    etag: str | None = Field(default=None, max_length=256)

    @model_validator(mode="after")
    def _only_s3_has_versions(self) -> "ImageRef":
        if self.version_id is not None and not self.in_s3:
            raise ValueError("version_id is for s3:// references")
        return self

    @property
    def in_s3(self) -> bool:
        """Whether it has a bucket and a key; else it is a URL."""
        return self.uri.startswith("s3://")

    @property
    def bucket(self) -> str:
        """The bucket's name; ValueError for a URL."""
        return split_s3_uri(self.uri)[0]

    @property
    def key(self) -> str:
        """The object's key; ValueError for a URL."""
        return split_s3_uri(self.uri)[1]


def _image_from_text(value: Any) -> Any:
    return {"uri": value} if isinstance(value, str) else value


Image = Annotated[ImageRef, BeforeValidator(_image_from_text)]
