"""Every message survives its way, and nothing but exactly these messages is taken."""

import math
import resource
from contextlib import suppress
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blipq_worker.inference import (
    Answer,
    Array,
    Embed,
    Embedded,
    Failure,
    Generate,
    Generated,
    GeneratedText,
    GenerationParams,
    ImagePixels,
    Item,
    Match,
    Matched,
    ModelInfo,
    Outcome,
    ProtocolError,
    Rank,
    Ranked,
    Recipe,
    Rerank,
    Reranked,
)
from blipq_worker.inference.protocol import (
    FROM_ENGINES,
    FROM_FRONTS,
    HEADER_SIZE,
    MOST_SUBMITTED,
    Answers,
    Beat,
    Cancel,
    Forget,
    Goodbye,
    Header,
    Hello,
    Known,
    Knows,
    Message,
    Submit,
    Vocabulary,
    Welcome,
    checked,
    encoded,
    encoded_answers,
)
from worker.inference.stand_in import INFO, TWO

FRONTS, ENGINES = Vocabulary(FROM_FRONTS), Vocabulary(FROM_ENGINES)

texts = st.text(st.characters(codec="utf-8"), max_size=20)
digests = st.text("0123456789abcdef", min_size=64, max_size=64)
images = st.builds(ImagePixels, st.none() | digests, st.booleans())
params = st.builds(
    GenerationParams,
    max_new_tokens=st.integers(1, 512),
    num_beams=st.integers(1, 16),
    do_sample=st.booleans(),
    temperature=st.floats(0, 10, exclude_min=True),
    length_penalty=st.floats(-10, 10),
    seed=st.none() | st.integers(0, 2**63 - 1),
)


def several(each: st.SearchStrategy[Any], least: int = 1) -> st.SearchStrategy[tuple[Any, ...]]:
    return st.lists(each, min_size=least, max_size=4).map(tuple)


items = st.one_of(
    st.builds(Generate, images, several(texts), params),
    st.builds(Rank, images, several(texts), several(texts)),
    st.builds(Match, images, several(texts), st.sampled_from(["itm", "itc"])),
    st.builds(Rerank, images, texts),
    st.builds(Embed, st.just("image"), images),
    st.builds(Embed, st.just("text"), st.none(), texts),
    st.builds(Embed, st.just("multimodal"), images, texts),
)
numbers = st.floats(allow_nan=False)
arrays = st.builds(Array, several(st.integers(0, 2**32)), st.binary(max_size=64))
values = st.one_of(
    st.builds(Generated, several(several(st.builds(GeneratedText, texts, st.integers(0, 512))))),
    st.builds(Ranked, several(several(numbers))),
    st.builds(Matched, several(numbers)),
    st.builds(Reranked, numbers, numbers),
    st.builds(Embedded, st.dictionaries(texts, arrays, max_size=3)),
)
outcomes = st.one_of(
    st.builds(Answer, values, numbers, numbers, st.integers(1, 512)),
    st.builds(Failure, st.sampled_from(["permanent", "cancelled"]), texts, texts),
)
counts = st.integers(0, 2**53 - 1)
from_fronts = st.one_of(
    st.builds(Hello, counts, st.from_regex(r"[A-Za-z0-9._@:-]{1,64}", fullmatch=True)),
    st.builds(Cancel),
    st.builds(Forget, several(digests, least=0)),
    st.builds(
        Knows,
        st.just("default"),
        several(digests),
        st.just(("generation", "patches")),
    ),
)
from_engines = st.one_of(
    st.builds(Welcome, st.just({"default": INFO, "two": TWO}), st.integers(1, 4096), counts),
    st.builds(Known, several(st.booleans(), least=0)),
    st.builds(Beat, counts, st.floats(0, 1e9), counts, counts),
    st.builds(Goodbye, texts),
)


def received(data: bytes, vocabulary: Vocabulary) -> Any:
    header = Header.unpacked(data[:HEADER_SIZE])
    vocabulary.check(header)
    assert header.body == len(data) - HEADER_SIZE
    return vocabulary.decoded(header, data[HEADER_SIZE:])


def plain(item: Item) -> Any:
    """An item's fields; images compare by what is sent of them."""
    fields = msgspec.structs.asdict(item)
    image = fields.pop("image", None)
    return type(item), fields, image and (image.digest, image.whole, image.pixels)


@settings(deadline=None)
@given(items, st.sampled_from(["high", "normal", "low"]), st.none() | st.floats(0, 1e9))
def test_every_item_reaches_the_engine_as_it_was(
    item: Item, priority: Any, seconds: float | None
) -> None:
    sent = Submit("default", priority, seconds, item)
    got = received(checked(sent, 7), FRONTS)
    assert (got.model, got.priority, got.seconds) == ("default", priority, seconds)
    assert plain(got.item) == plain(item)


@settings(deadline=None)
@given(from_fronts)
def test_every_message_of_a_front_arrives_as_it_was(message: Message) -> None:
    assert received(encoded(message, 2**53), FRONTS) == message


@settings(deadline=None)
@given(from_engines)
def test_every_message_of_an_engine_arrives_as_it_was(message: Message) -> None:
    assert received(encoded(message), ENGINES) == message


@settings(deadline=None)
@given(st.lists(st.tuples(counts, outcomes), max_size=8))
def test_answers_arrive_in_order_and_none_is_missing(sent: list[tuple[int, Outcome]]) -> None:
    got = [received(data, ENGINES) for data in encoded_answers(sent)]
    assert [pair for message in got for pair in message.outcomes] == sent


def test_many_large_answers_are_several_messages() -> None:
    features = Embedded({"image_embeds": Array((32, 768), bytes(32 * 768 * 4))})
    sent = [(id, Answer(features, 1.0, 1.0, 1)) for id in range(10)]
    messages = list(encoded_answers(sent))
    assert 1 < len(messages) < 10
    assert max(map(len, messages)) < 2**20


def test_an_answer_too_long_for_any_message_is_a_failure() -> None:
    features = Embedded({"image_embeds": Array((2**22,), bytes(2**24))})
    [message] = encoded_answers([(1, Answer(features, 1.0, 1.0, 1))])
    [(id, outcome)] = received(message, ENGINES).outcomes
    assert (id, outcome.kind) == (1, "permanent")


def test_a_failure_whose_text_has_no_utf_8_is_told_all_the_same() -> None:
    """Names of files may be such texts, and errors repeat them."""
    (data,) = encoded_answers([(1, Failure("internal", "internal", "no file '\udcff'"))])
    ((id, outcome),) = ENGINES.decoded(
        Header.unpacked(data[:HEADER_SIZE]), data[HEADER_SIZE:]
    ).outcomes
    assert id == 1
    assert isinstance(outcome, Failure)
    assert "\\udcff" in outcome.message


def test_an_answer_that_is_no_plain_data_is_a_failure() -> None:
    wrong = Answer(Matched((object(),)), 1.0, 1.0, 1)  # type: ignore[arg-type]
    [message] = encoded_answers([(1, wrong)])
    [(_, outcome)] = received(message, ENGINES).outcomes
    assert outcome.kind == "internal"


def test_a_seed_has_63_bits() -> None:
    with pytest.raises(ValueError, match="9223372036854775807"):
        submitted(params=GenerationParams(seed=2**63))


def submitted(
    params: GenerationParams | None = None,
    prompts: tuple[str, ...] = ("",),
    seconds: float | None = None,
    digest: str | None = None,
) -> bytes:
    item = Generate(ImagePixels(digest), prompts, params or GenerationParams())
    return checked(Submit("default", "normal", seconds, item), 1)


@pytest.mark.parametrize("name", ["temperature", "top_p", "repetition_penalty", "length_penalty"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 11.0])
def test_a_parameter_out_of_bounds_is_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match="Submit"):
        submitted(params=GenerationParams(**{name: value}))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "fields",
    [
        {"seconds": math.nan},
        {"seconds": math.inf},
        {"seconds": -1.0},
        {"prompts": ()},
        {"prompts": ("",) * 65},
        {"prompts": ("x" * 32_769,)},
        {"digest": "A" * 64},
        {"digest": "a" * 63},
        {"digest": "a" * 63 + "\n"},
        {"params": GenerationParams(max_new_tokens=513)},
        {"params": GenerationParams(num_beams=0)},
        {"params": GenerationParams(do_sample=1)},  # type: ignore[arg-type]
        {"params": GenerationParams(top_k=True)},
        {"params": GenerationParams(seed=1.0)},  # type: ignore[arg-type]
    ],
)
def test_what_an_engine_would_refuse_is_not_sent(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="Submit"):
        submitted(**fields)


@pytest.mark.parametrize("name", ["", "x" * 65, "two\nlines", "\x1b[2J", "é"])
def test_a_process_has_a_name_that_cannot_spoil_a_log(name: str) -> None:
    with pytest.raises(ValueError, match="Hello"):
        checked(Hello(1, name), 0)


def body(value: Any) -> bytes:
    return msgspec.msgpack.encode(value)


#: A whole Submit as msgpack has it, to be spoilt.
GOOD = ["default", "normal", None, ["match", [None, False, 1], ["a cat"], "itm"], False]


def spoilt(path: tuple[int, ...], value: Any) -> bytes:
    whole = msgspec.msgpack.decode(body(GOOD))
    at = whole
    for step in path[:-1]:
        at = at[step]
    at[path[-1] :] = [value, *at[path[-1] + 1 :]]
    return body(whole)


HOSTILE = {
    "nothing": b"",
    "a map": body({"model": "default"}),
    "one field too few": body(GOOD[:3]),
    "one field too many": body([*GOOD, 1]),
    "an item with one field too many": spoilt((3,), [*GOOD[3], 1]),
    "an image with one field too few": spoilt((3, 1), [None, False]),
    "an image with one field too many": spoilt((3, 1), [None, False, 1, 1]),
    "an image whose origin is no number": spoilt((3, 1), [None, False, "1"]),
    "an image whose origin is below zero": spoilt((3, 1), [None, False, -1]),
    "an item that is alone in words": spoilt((4,), "yes"),
    "an unknown item": spoilt((3, 0), "burn"),
    "an unknown head": spoilt((3, 3), "all"),
    "an unknown priority": spoilt((1,), "urgent"),
    "a number for a text": spoilt((3, 2), [1]),
    "bytes for a text": spoilt((3, 2), [b"a cat"]),
    "too many texts": spoilt((3, 2), ["a"] * 257),
    "no texts": spoilt((3, 2), []),
    "an embed without its text": spoilt((3,), ["embed", "text", None, None]),
    "an embed with an image too many": spoilt((3,), ["embed", "text", [None, False, 1], "a"]),
    "two messages": body(GOOD) * 2,
    "lone surrogates": body(GOOD).replace(b"a cat", b"\xed\xa0\x80ab"),
    "no UTF-8": body(GOOD).replace(b"a cat", b"\xff\xff\xff\xff\xff"),
    "a text of 4 GiB": b"\x94\xdb\xff\xff\xff\xffabc",
    "an array of 4 billion": b"\xdd\xff\xff\xff\xff",
    "an item of 4 billion texts": body(GOOD).replace(
        b"\x91\xa5a cat", b"\xdd\xff\xff\xff\xff\xa1a"
    ),
    "a map of 4 billion": b"\xdf\xff\xff\xff\xff",
    "deep arrays": b"\x91" * 100_000 + b"\xc0",
    "deep arrays as an item": b"\x95\xa7default\xa6normal\xc0" + b"\x91" * 100_000 + b"\xc0",
    "deep maps": b"\x81\xa1a" * 100_000 + b"\xc0",
    "a timestamp": b"\xd6\xff\0\0\0\0",
    "an extension": b"\xc7\xff\x05" + b"a" * 255,
    "reserved": b"\xc1",
}


def test_what_is_spoilt_here_is_good_before() -> None:
    message = Vocabulary(FROM_FRONTS).decoded(Header(2, 1, len(body(GOOD)), 0), body(GOOD))
    assert isinstance(message, Submit)


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_body_that_is_not_exactly_a_submit_is_refused(data: bytes) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ProtocolError):
        FRONTS.decoded(Header(2, 1, len(data), 0), data)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024  # KiB


@settings(deadline=None)
@given(st.binary(max_size=300), st.sampled_from([1, 2, 3, 4]))
def test_random_bodies_are_refused_or_are_messages(data: bytes, number: int) -> None:
    with suppress(ProtocolError):
        FRONTS.decoded(Header(number, 1, len(data), 0), data)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"number": 18}, "not for this side"),
        ({"number": 0}, "not for this side"),
        ({"body": MOST_SUBMITTED + 1}, "at most"),
        ({"number": 3, "body": 17}, "at most"),
        ({"number": 1, "blob": 1}, "pixels"),
    ],
)
def test_a_header_out_of_bounds_is_refused(change: dict[str, int], why: str) -> None:
    fields = {"number": 2, "id": 1, "body": 100, "blob": 0} | change
    with pytest.raises(ProtocolError, match=why):
        FRONTS.check(Header(**fields))


def test_another_version_is_refused_by_name() -> None:
    data = bytearray(encoded(Cancel(), 1)[:HEADER_SIZE])
    data[2] = 9
    with pytest.raises(ProtocolError, match="protocol version 9"):
        Header.unpacked(data)
    with pytest.raises(ProtocolError, match="no messages of blipq"):
        Header.unpacked(b"\0" * HEADER_SIZE)


def test_pixels_are_no_part_of_a_body() -> None:
    item = Generate(
        ImagePixels("a" * 64, True, (memoryview(bytes(150_528)),)), ("",), GenerationParams()
    )
    data = checked(Submit("default", "normal", None, item), 1, 150_528)
    assert len(data) < 256
    image = received(data, FRONTS).item.image
    assert (image.digest, image.whole, image.pixels) == ("a" * 64, True, ())


def test_an_image_has_one_array_where_both_checkpoints_preprocess_alike() -> None:
    assert [recipe.side for recipe in TWO.recipes] == [16, 8]
    alike = msgspec.structs.replace(TWO, retrieval_recipe=Recipe(16, 3, "one"))
    assert [recipe.side for recipe in alike.recipes] == [16]
    assert isinstance(alike, ModelInfo)
    assert INFO.pixels_size == 150_528


def test_on_opt_new_tokens_take_room_from_a_prompt() -> None:
    assert INFO.room(30) == 1986
    assert TWO.room(30) == 2016


def test_answers_are_the_only_message_without_a_bound_on_its_numbers() -> None:
    [message] = encoded_answers([(1, Answer(Matched((math.nan,)), 1.0, 1.0, 1))])
    got = received(message, ENGINES)
    assert isinstance(got, Answers)
    assert math.isnan(got.outcomes[0][1].value.scores[0])
