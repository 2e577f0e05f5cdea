"""References to images in S3, or at URLs."""

import re
from typing import Annotated, Any
from urllib.parse import quote

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from blipq.contract.base import HALF_A_PAIR, Input
from blipq.ssrf import policy as guard

#: As S3 takes them; old buckets, and those of other stores, may have capitals and underscores.
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,61}[A-Za-z0-9]")
_HTTP = re.compile(r"(?P<place>https?://[^/?#]*)(?P<path>[/?][^#]*)(#.*)?", re.I | re.DOTALL)
#: 50 TB, the most that S3 takes.
_LARGEST_OBJECT = 50 * 10**12
_TO_ENCODE = re.compile(r"[^\x00-\x7f]+|\x20+")
_ARN = re.compile(r"arn:[a-z-]+:s3:::(?P<place>.+)", re.DOTALL)


def s3_form(arn: str) -> str | None:
    """The ``s3://`` form of a bucket's or an object's ARN; None for any other text."""
    found = _ARN.fullmatch(arn)
    return f"s3://{found['place']}" if found else None


def no_s3_uri(text: str, form: str) -> str:
    """The error for a text that is not of the form ``s3://...``; for an ARN, what to write."""
    hint = "" if (found := s3_form(text)) is None else f": write {found}"
    return f"{text!r} is not of the form {form}{hint}"


def split_s3_uri(uri: str) -> tuple[str, str]:
    """Bucket and key of ``s3://bucket/key``; ValueError, with the fault, for another text."""
    scheme, _, rest = uri.partition("://")
    bucket, _, key = rest.partition("/")
    if scheme != "s3" or not bucket or not key:
        raise ValueError(no_s3_uri(uri, "s3://bucket/key"))
    checked_bucket(bucket)
    try:
        size = len(key.encode())
    except UnicodeEncodeError:
        raise ValueError(HALF_A_PAIR) from None
    if size > 1024:
        raise ValueError("an S3 key has at most 1,024 bytes")
    return bucket, key


def checked_bucket(name: str) -> str:
    """A bucket's name. Raises ValueError for what no S3 would take."""
    if _BUCKET.fullmatch(name) is None:
        raise ValueError(
            f"{name!r} is no name of a bucket: 3 to 63 letters, digits, '-', '.' and '_', with a "
            "letter or a digit at both ends"
        )
    return name


def _checked_s3_uri(uri: str) -> str:
    split_s3_uri(uri)
    return uri


S3Uri = Annotated[str, AfterValidator(_checked_s3_uri)]


def _checked_image_uri(uri: str) -> str:
    if (url := _HTTP.fullmatch(uri)) is not None:
        # As browsers do; the host is left as it is, for the guard to refuse.
        uri = url["place"] + _TO_ENCODE.sub(lambda text: quote(text[0]), url["path"])
    if uri.lower().startswith(("https://", "http://")):
        guard.parse(uri)
        return uri
    return _checked_s3_uri(uri)


class ImageRef(Input):
    """An object in S3, or at a public https:// URL.

    With ``etag`` or ``version_id`` (S3 alone) the worker refuses any other bytes. With ``offset``
    and ``length`` the image is that part of the object, such as a member of a tar; these need one
    of the two, as a part of other bytes would be no image.
    """

    uri: Annotated[str, Field(max_length=4096), AfterValidator(_checked_image_uri)]
    version_id: str | None = Field(default=None, max_length=1024)
    etag: str | None = Field(default=None, max_length=256)
    offset: int | None = Field(default=None, ge=0, le=_LARGEST_OBJECT)
    length: int | None = Field(default=None, ge=1, le=_LARGEST_OBJECT)

    @model_validator(mode="after")
    def _only_s3_has_versions_and_parts(self) -> "ImageRef":
        if self.in_s3:
            return self
        for name in ("version_id", "offset", "length"):
            if getattr(self, name) is not None:
                raise ValueError(f"{name} is for s3:// references")
        return self

    @model_validator(mode="after")
    def _a_part_is_whole_and_pinned(self) -> "ImageRef":
        if (self.offset is None) != (self.length is None):
            raise ValueError("offset and length go together")
        if self.is_part and self.etag is None and self.version_id is None:
            raise ValueError("offset and length need an etag or a version_id beside them")
        return self

    @property
    def is_part(self) -> bool:
        """Whether it is a part of an object, not the whole."""
        return self.offset is not None

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
    """A text as a reference, without what a line of a file leaves around it.

    An ``ImageRef`` that a program made is taken as it is: a key may end with a line end.
    """
    if not isinstance(value, str):
        return value
    text = value.lstrip().rstrip("\r\n")
    return {"uri": f"s3://{text[5:]}" if text[:5].lower() == "s3://" else text}


Image = Annotated[
    ImageRef, BeforeValidator(_image_from_text, json_schema_input_type=str | ImageRef)
]
