"""The messages between a front and its engine, and how they lie on a stream.

A message is a header of fixed size, a body of msgpack with exactly the fields of its type, and for
a ``Submit`` the pixels as they are. The request's id is in the header; 0 where there is none. Both
processes run on one host and come from one installation: another version is refused.
"""

import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from blipq_worker.inference.requests import (
    Count,
    Digest,
    Failure,
    Feature,
    ImagePixels,
    Item,
    ModelInfo,
    Name,
    Origin,
    Outcome,
    Plain,
    Priority,
    ProcessName,
    Seconds,
    TraceParent,
)

VERSION = 1
#: Bodies. An item in the longest UTF-8: 64 prompts of 32,768 characters, 256 choices or texts of
#: 4,096 as the contract bounds them, and all else. Answers: some features.
MOST_SUBMITTED = 4 * (64 * 32_768 + 256 * 4096) + 64 * 1024
MOST_TOLD, MOST_SMALL = 16 * 2**20, 32 * 1024
#: Answers go together until their bodies are so long.
ANSWERS_TOGETHER = 256 * 1024

#: The most images that one message names.
MOST_DIGESTS = 256
Digests = Annotated[tuple[Digest, ...], Meta(max_length=MOST_DIGESTS)]

_HEADER = struct.Struct("<2sBBQII")
_MAGIC = b"bq"
HEADER_SIZE = _HEADER.size


class ProtocolError(Exception):
    """The other side broke the protocol: the connection ends, and nothing else."""


class Hello(Plain, frozen=True):
    """A front's first message."""

    pid: Count
    name: ProcessName


class Submit(Plain, frozen=True):
    """An item. seconds: to its deadline. alone: it runs while nothing else does.

    trace: the span that waits for it, or "". Pixels follow unless the image comes without.
    """

    model: Name
    priority: Priority
    seconds: Seconds | None
    item: Item
    alone: bool = False
    trace: TraceParent = ""


class Cancel(Plain, frozen=True):
    """Nobody waits for the item with this id any more. It is answered all the same."""


class Knows(Plain, frozen=True):
    """Which of these images need no look for these features?"""

    model: Name
    digests: Digests
    features: Annotated[tuple[Feature, ...], Meta(min_length=1, max_length=3)]


class Forget(Plain, frozen=True):
    """Nothing is to be known of these images any more. It has no answer."""

    digests: Digests


class Welcome(Plain, frozen=True):
    """The answer to Hello. credits: the most items without an answer that the front may have."""

    models: Annotated[dict[Name, ModelInfo], Meta(max_length=64)]
    credits: Annotated[int, Meta(ge=1, le=4096)]
    pid: Count


class Answers(Plain, frozen=True):
    """What items came to, by their ids."""

    outcomes: tuple[tuple[Count, Outcome], ...]


class Started(Plain, frozen=True):
    """A pass begins that these items newly take part in: sent before it, once for each item."""

    ids: Annotated[tuple[Count, ...], Meta(max_length=4096)]


class Known(Plain, frozen=True):
    """The answer to Knows."""

    known: tuple[bool, ...]


class Beat(Plain, frozen=True):
    """The engine's thread is alive. step: counts its turns, of the model and of waiting for it.

    progress_s: seconds since what runs last made progress; 0 where nothing runs. quiet_s: for so
    long it may say nothing after this, and is not hung.
    """

    step: Count
    progress_s: Seconds
    waiting: Count
    running: Count
    quiet_s: Seconds = 0.0


class Goodbye(Plain, frozen=True):
    """The engine ends this connection."""

    reason: Annotated[str, Meta(max_length=512)]


FrontMessage = Hello | Submit | Cancel | Knows | Forget
EngineMessage = Welcome | Started | Answers | Known | Beat | Goodbye
Message = FrontMessage | EngineMessage


@dataclass(frozen=True, slots=True)
class Kind:
    """A type of message: its number, and the longest body."""

    number: int
    type: type
    most: int


FROM_FRONTS = (
    Kind(1, Hello, MOST_SMALL),
    Kind(2, Submit, MOST_SUBMITTED),
    Kind(3, Cancel, 16),
    Kind(4, Knows, MOST_SMALL),
    Kind(5, Forget, MOST_SMALL),
)
FROM_ENGINES = (
    Kind(17, Welcome, 2**20),
    Kind(18, Answers, MOST_TOLD),
    Kind(19, Known, MOST_SMALL),
    Kind(20, Beat, MOST_SMALL),
    Kind(21, Goodbye, MOST_SMALL),
    Kind(22, Started, 64 * 1024),
)
_NUMBERS = {kind.type: kind.number for kind in (*FROM_FRONTS, *FROM_ENGINES)}


class _Head(Plain, frozen=True):
    """A body's record of an image."""

    digest: Digest | None
    whole: bool
    origin: Count


def _to_plain(value: object) -> object:
    if isinstance(value, ImagePixels):
        return _Head(value.digest, value.whole, value.origin.number)
    raise TypeError(f"{type(value).__name__} has no form on the wire")


def _from_plain(wanted: type, value: object) -> object:
    assert wanted is ImagePixels
    head = msgspec.convert(value, _Head)
    return ImagePixels(head.digest, head.whole, origin=Origin(head.origin))


_encoder = msgspec.msgpack.Encoder(enc_hook=_to_plain)


@dataclass(frozen=True, slots=True)
class Header:
    """What comes before a body. body, blob: their lengths in bytes."""

    number: int
    id: int
    body: int
    blob: int

    @classmethod
    def unpacked(cls, data: "bytes | bytearray | memoryview") -> "Header":
        """Raises ProtocolError for what is no header of this version."""
        magic, version, number, id, body, blob = _HEADER.unpack(data)
        if magic != _MAGIC:
            raise ProtocolError("these are no messages of blipq")
        if version != VERSION:
            raise ProtocolError(f"protocol version {version}, where this side has {VERSION}")
        return cls(number, id, body, blob)


class Vocabulary:
    """The messages that one side may send."""

    def __init__(self, kinds: Iterable[Kind]) -> None:
        self._kinds: Mapping[int, tuple[Kind, msgspec.msgpack.Decoder[Any]]] = {
            kind.number: (kind, msgspec.msgpack.Decoder(kind.type, dec_hook=_from_plain))
            for kind in kinds
        }

    def check(self, header: Header) -> None:
        """Raises ProtocolError for a type that this side may not send, or a body too long."""
        if header.number not in self._kinds:
            raise ProtocolError(f"a message of type {header.number} is not for this side")
        kind, _ = self._kinds[header.number]
        if header.body > kind.most:
            raise ProtocolError(
                f"{kind.type.__name__} of {header.body:,} bytes, {kind.most:,} at most"
            )
        if header.blob and kind.type is not Submit:
            raise ProtocolError(f"{kind.type.__name__} with {header.blob:,} bytes of pixels")

    def decoded(self, header: Header, body: "bytes | bytearray | memoryview") -> Any:
        """The message. Raises ProtocolError for anything but exactly its fields."""
        kind, decoder = self._kinds[header.number]
        try:
            return decoder.decode(body)
        except Exception as error:  # of msgspec; also UnicodeDecodeError, RecursionError
            raise ProtocolError(f"{kind.type.__name__}: {error}"[:400]) from error


_FROM_FRONTS = Vocabulary(FROM_FRONTS)


def encoded(message: Message, id: int = 0, blob: int = 0) -> bytes:
    """Header and body. blob: bytes of pixels that the caller sends after them."""
    body = _encoder.encode(message)
    return _HEADER.pack(_MAGIC, VERSION, _NUMBERS[type(message)], id, len(body), blob) + body


def checked(message: FrontMessage, id: int, blob: int = 0) -> bytes:
    """As ``encoded``; ValueError for what an engine would refuse.

    A front must not send such a thing: it would lose its connection and all its items.
    """
    data = encoded(message, id, blob)
    header = Header.unpacked(data[:HEADER_SIZE])
    try:
        _FROM_FRONTS.check(header)
        _FROM_FRONTS.decoded(header, data[HEADER_SIZE:])
    except ProtocolError as error:
        raise ValueError(str(error)) from error
    return data


def encoded_answers(outcomes: Iterable[tuple[int, Outcome]]) -> Iterator[bytes]:
    """Messages of type Answers: as few as their length allows."""
    together: list[msgspec.Raw] = []
    size = 0
    for id, outcome in outcomes:
        entry = _entry(id, outcome)
        if together and size + len(entry) > ANSWERS_TOGETHER:
            yield _answers(together)
            together, size = [], 0
        together.append(msgspec.Raw(entry))
        size += len(entry)
    if together:
        yield _answers(together)


def _entry(id: int, outcome: Outcome) -> bytes:
    """An answer's part of the body; a failure where no message can have it."""
    try:
        entry = _encoder.encode((id, outcome))
    except (TypeError, ValueError) as error:  # ValueError: a text without UTF-8
        return _encoder.encode((id, Failure("internal", "internal", f"no answer: {error}")))
    if len(entry) <= MOST_TOLD - 64:
        return entry
    size = f"an answer of {len(entry):,} bytes, {MOST_TOLD:,} at most"
    return _encoder.encode((id, Failure("permanent", "internal", size)))


def _answers(entries: list[msgspec.Raw]) -> bytes:
    body = _encoder.encode(([*entries],))
    return _HEADER.pack(_MAGIC, VERSION, _NUMBERS[Answers], 0, len(body), 0) + body
