"""What crosses the wire survives the wire."""

import base64
import struct
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, TypeAdapter, ValidationError

from blipq import ErrorCode, Kind, Options, Priority, Status
from blipq.contract import (
    Answer,
    Array,
    Caption,
    CaptionRequest,
    CaptionResult,
    Choice,
    DescribeRequest,
    DescribeResult,
    EmbedRequest,
    EmbedResult,
    Generation,
    Hit,
    ImageRef,
    IndexEntry,
    JobError,
    JobInfo,
    MatchRequest,
    MatchResult,
    Receipt,
    SearchRequest,
    SearchResult,
    Seconds,
    TextScore,
    Turn,
    VQARequest,
    VQAResult,
    Webhook,
    request_adapter,
    result_adapter,
    split_s3_uri,
)

IMAGE = "s3://uploads/cat.jpg"


names = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,20}", fullmatch=True)


def several(item: st.SearchStrategy, least: int = 1) -> st.SearchStrategy:
    return st.lists(item, min_size=least, max_size=4).map(tuple)


def maybe(item: st.SearchStrategy) -> st.SearchStrategy:
    return st.none() | item


texts = st.text(min_size=1, max_size=20).filter(str.strip)
numbers = st.floats(allow_nan=False, allow_infinity=False, width=32)
keys = st.text(min_size=1, max_size=60)
images = st.builds(ImageRef, uri=keys.map(lambda key: f"s3://uploads/{key}"), etag=maybe(texts))
generations = st.builds(
    Generation,
    max_new_tokens=maybe(st.integers(1, 512)),
    num_beams=maybe(st.integers(1, 16)),
    do_sample=maybe(st.booleans()),
    temperature=maybe(st.floats(0.1, 10)),
    seed=maybe(st.integers(0, 2**63 - 1)),
)
offered = st.lists(
    texts.filter(str.strip), min_size=2, max_size=4, unique_by=lambda text: text.strip()
).map(tuple)
requests = st.one_of(
    st.builds(
        CaptionRequest,
        image=images,
        prompt=maybe(st.text(max_size=20)),
        generation=maybe(generations),
        best_of=maybe(st.integers(1, 16)),
    ),
    st.builds(
        VQARequest,
        image=images,
        questions=several(texts),
        history=several(st.builds(Turn, question=texts, answer=texts), 0),
        generation=maybe(generations),
    ),
    st.builds(VQARequest, image=images, questions=several(texts), choices=offered),
    st.builds(
        MatchRequest, image=images, texts=several(texts), head=st.sampled_from(["itm", "itc"])
    ),
    st.builds(
        EmbedRequest, image=images, text=texts, mode=st.sampled_from(["image", "multimodal"])
    ),
    st.builds(DescribeRequest, image=images, questions=several(texts, 0), embed=st.booleans()),
    st.builds(
        SearchRequest,
        index=names,
        text=texts,
        top_k=st.integers(1, 1000),
        filter=maybe(st.dictionaries(texts, texts | several(texts), min_size=1, max_size=3)),
    ),
    st.builds(EmbedRequest, image=images, index=st.builds(IndexEntry, name=names)),
)
options = st.builds(
    Options,
    model=names,
    priority=st.sampled_from(Priority),
    expires_in=maybe(st.floats(0.001, 30 * 86400)),
    idempotency_key=maybe(texts),
    webhook=maybe(st.builds(Webhook, url=st.just("https://example.org/hook"))),
    output=st.none() | st.just("s3://results/1.json"),
    metadata=st.dictionaries(st.text(max_size=10), st.text(max_size=10), max_size=16),
)
captions = st.builds(
    CaptionResult, captions=several(st.builds(Caption, text=texts, score=maybe(numbers)))
)
matches = st.builds(
    MatchResult,
    head=st.sampled_from(["itm", "itc"]),
    scores=several(st.builds(TextScore, text=texts, score=numbers)),
)
choices = several(st.builds(Choice, text=texts, probability=numbers))
answers = st.builds(
    VQAResult,
    answers=several(st.builds(Answer, question=texts, text=texts, choices=maybe(choices))),
)
arrays = st.builds(
    Array, shape=several(st.integers(0, 9)), dtype=st.just("float16"), data=st.just("AAA=")
)
embeddings = st.builds(EmbedResult, arrays=st.dictionaries(texts, arrays, max_size=3))
results = st.one_of(
    captions,
    answers,
    matches,
    embeddings,
    st.builds(DescribeResult, caption=maybe(captions), vqa=maybe(answers), embed=maybe(embeddings)),
    st.builds(SearchResult, hits=several(st.builds(Hit, id=texts, itc=numbers), 0)),
)
jobs = st.builds(
    JobInfo,
    id=texts,
    kind=st.sampled_from(Kind),
    model=texts,
    status=st.sampled_from(Status),
    created_at=st.datetimes(timezones=st.just(UTC)),
    expires_at=st.datetimes(timezones=st.just(UTC)),
    result=maybe(results),
    error=maybe(
        st.builds(JobError, code=st.sampled_from(ErrorCode), message=texts, retryable=st.booleans())
    ),
    receipt=maybe(st.builds(Receipt, tokens=maybe(st.integers(0, 999)), note=maybe(texts))),
)


@given(requests)
def test_a_request_survives_json(request: BaseModel) -> None:
    assert request_adapter.validate_json(request.model_dump_json()) == request


@given(requests)
def test_a_request_survives_without_its_defaults(request: BaseModel) -> None:
    short = request.model_dump(exclude_defaults=True, mode="json") | {"kind": request.kind}
    assert request_adapter.validate_python(short) == request


@given(results)
def test_a_result_survives_json(result: BaseModel) -> None:
    assert result_adapter.validate_json(result.model_dump_json(exclude_none=True)) == result


@given(options)
def test_options_survive_json(given_options: Options) -> None:
    assert Options.model_validate_json(given_options.model_dump_json()) == given_options


@given(jobs)
def test_a_job_survives_json(info: JobInfo) -> None:
    assert JobInfo.model_validate_json(info.model_dump_json(exclude_none=True)) == info


@given(requests)
def test_a_misspelt_field_of_a_request_is_refused(request: BaseModel) -> None:
    misspelt = request.model_dump(mode="json") | {"num_beans": 3}
    with pytest.raises(ValidationError, match="num_beans"):
        request_adapter.validate_python(misspelt)


@given(results)
def test_a_newer_workers_extra_field_is_ignored(result: BaseModel) -> None:
    newer = result.model_dump(mode="json") | {"added_later": [1]}
    assert result_adapter.validate_python(newer) == result


@pytest.mark.parametrize("model", [Options, ImageRef, Generation, Turn, Webhook])
def test_whatever_a_caller_writes_refuses_unknown_fields(model: type[BaseModel]) -> None:
    with pytest.raises(ValidationError, match="added"):
        model.model_validate({"added": 1})


def test_models_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        ImageRef(uri=IMAGE).uri = "s3://uploads/dog.jpg"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("written", "seconds"),
    [
        (90, 90),
        ("90", 90),
        ("90s", 90),
        ("500ms", 0.5),
        ("10m", 600),
        ("1.5h", 5400),
        (" 7 d ", 604800),
    ],
)
def test_a_duration_is_seconds_or_a_number_with_a_unit(written: object, seconds: float) -> None:
    assert TypeAdapter(Seconds).validate_python(written) == pytest.approx(seconds)


def test_a_timedelta_is_a_duration() -> None:
    assert Options(expires_in=timedelta(minutes=2)).expires_in == 120


@pytest.mark.parametrize("wrong", ["", "10 parsecs", "-5s", "1e3s", 0, -1, "31d"])
def test_other_deadlines_are_refused(wrong: object) -> None:
    with pytest.raises(ValidationError, match="expires_in"):
        Options.model_validate({"expires_in": wrong})


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_a_deadline_is_a_number(wrong: float) -> None:
    with pytest.raises(ValidationError, match="expires_in"):
        Options(expires_in=wrong)


@given(keys)
def test_a_key_may_hold_any_character(key: str) -> None:
    assert split_s3_uri(f"s3://uploads/{key}") == ("uploads", key)


@pytest.mark.parametrize(
    "wrong",
    [
        "",
        "gs://uploads/a.jpg",
        "cat.jpg",
        "s3://",
        "s3://uploads",
        "s3://uploads/",
        "s3:///key",
        "S3://uploads/key",
        "s3a://uploads/key",
        "file:///etc/passwd",
    ],
)
def test_other_image_references_are_refused(wrong: str) -> None:
    with pytest.raises(ValidationError, match="s3://bucket/key"):
        ImageRef(uri=wrong)


@pytest.mark.parametrize("bucket", ["my_bucket", "Photos_2015", "a.b-c", "x" * 63])
def test_a_bucket_may_have_the_name_of_an_old_one(bucket: str) -> None:
    assert ImageRef(uri=f"s3://{bucket}/a.jpg").bucket == bucket


@pytest.mark.parametrize("bucket", ["u", "-ab", "a b", "x" * 64, "größe"])
def test_what_is_no_name_of_a_bucket_is_named(bucket: str) -> None:
    with pytest.raises(ValidationError, match=f"'{bucket}' is no name of a bucket"):
        ImageRef(uri=f"s3://{bucket}/a.jpg")


@pytest.mark.parametrize(
    ("written", "uri"),
    [
        (" s3://uploads/a.jpg", "s3://uploads/a.jpg"),
        ("s3://uploads/a.jpg\r\n", "s3://uploads/a.jpg"),
        ("S3://uploads/a.jpg", "s3://uploads/a.jpg"),
        ("s3://uploads/a.jpg ", "s3://uploads/a.jpg "),
        ("https://example.org/my photo.png?q=ä b#top", None),
        ("https://example.org/été.png\n", "https://example.org/%C3%A9t%C3%A9.png"),
        ("https://example.org/%C3%A9?a=%20", "https://example.org/%C3%A9?a=%20"),
    ],
)
def test_an_image_is_named_as_people_write_it(written: str, uri: str | None) -> None:
    request = CaptionRequest(image=written)
    assert request.image.uri == (uri or "https://example.org/my%20photo.png?q=%C3%A4%20b")
    assert CaptionRequest.model_validate_json(request.model_dump_json()) == request


def test_a_reference_that_a_program_made_keeps_the_line_end_of_its_key() -> None:
    image = ImageRef(uri="s3://uploads/a\n")
    assert CaptionRequest(image=image).image.key == "a\n"


@pytest.mark.parametrize("wrong", ["https://exämple.org/", "https://a.org\\@b/", "https://a b/"])
def test_the_host_of_a_url_is_never_rewritten(wrong: str) -> None:
    with pytest.raises(ValidationError, match="printable ASCII"):
        CaptionRequest(image=wrong)


def test_an_image_may_be_at_a_url_with_an_etag() -> None:
    image = ImageRef(uri="https://example.org/cat.jpg?size=large", etag='"1"')
    assert not image.in_s3
    assert ImageRef(uri="s3://uploads/cat.jpg").in_s3


def test_a_key_has_at_most_1024_bytes() -> None:
    assert ImageRef(uri="s3://uploads/" + "é" * 512).key == "é" * 512
    with pytest.raises(ValidationError, match="1,024 bytes"):
        ImageRef(uri="s3://uploads/" + "é" * 513)


def test_an_image_reference_knows_its_bucket_and_key() -> None:
    image = ImageRef(uri="s3://uploads/2026/cat.jpg")
    assert (image.bucket, image.key) == ("uploads", "2026/cat.jpg")


def test_one_text_stands_for_a_list_of_one() -> None:
    assert VQARequest.model_validate({"image": IMAGE, "questions": "why?"}).questions == ("why?",)


@pytest.mark.parametrize("wrong", [[], "", ["fine", ""], ["x" * 4097], ["x"] * 65])
def test_questions_are_neither_none_nor_empty_nor_too_many(wrong: object) -> None:
    with pytest.raises(ValidationError, match="questions"):
        VQARequest.model_validate({"image": IMAGE, "questions": wrong})


@pytest.mark.parametrize(
    "wrong",
    [{str(i): "" for i in range(17)}, {"k" * 65: "v"}, {"k": "v" * 1025}, {"k": 3}],
)
def test_metadata_is_at_most_16_short_pairs_of_text(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError, match="metadata"):
        Options.model_validate({"metadata": wrong})


@pytest.mark.parametrize("wrong", ["", "a b", "-a", "a/b", "a:b", "x" * 65])
def test_a_model_name_fits_into_queue_names_and_keys(wrong: str) -> None:
    with pytest.raises(ValidationError, match="model"):
        Options(model=wrong)


def test_embedding_a_text_and_an_image_needs_both() -> None:
    with pytest.raises(ValidationError, match="needs a text"):
        EmbedRequest.model_validate({"image": IMAGE, "mode": "multimodal"})
    with pytest.raises(ValidationError, match="needs an image, a text, or both"):
        EmbedRequest.model_validate({})


@pytest.mark.parametrize("query", [{}, {"text": "a cat", "image": IMAGE}])
def test_a_search_is_by_a_text_or_by_an_image(query: dict[str, str]) -> None:
    with pytest.raises(ValidationError, match="either a text or an image"):
        SearchRequest.model_validate({"index": "pets", **query})


def test_an_index_is_named_in_short_and_takes_images_only() -> None:
    request = EmbedRequest.model_validate({"image": IMAGE, "index": "pets"})
    assert request.index == IndexEntry(name="pets")
    with pytest.raises(ValidationError, match="an index holds images"):
        EmbedRequest.model_validate({"text": "a cat", "mode": "text", "index": "pets"})
    with pytest.raises(ValidationError, match="pattern"):
        EmbedRequest.model_validate({"image": IMAGE, "index": "../pets"})


@pytest.mark.parametrize("filter", [{}, "id = 1", {"a": []}, {"a": 1}, {"a": {"or": "b"}}])
def test_a_filter_is_texts_by_name(filter: object) -> None:
    with pytest.raises(ValidationError, match="filter"):
        SearchRequest.model_validate({"index": "pets", "text": "a cat", "filter": filter})


def test_the_best_answer_is_at_hand() -> None:
    scores = (TextScore(text="a cat", score=0.2), TextScore(text="a dog", score=0.7))
    assert MatchResult(head="itm", scores=scores).best.text == "a dog"
    assert CaptionResult(captions=(Caption(text="a"), Caption(text="b"))).text == "a"
    assert VQAResult(answers=(Answer(question="why?", text="because"),)).text == "because"


def test_an_open_job_has_not_ended() -> None:
    now = datetime.now(UTC)
    running = JobInfo(
        id="1", kind="caption", model="m", status="running", created_at=now, expires_at=now
    )
    assert not running.ended
    assert running.model_copy(update={"status": Status.EXPIRED}).ended


@pytest.mark.parametrize(("dtype", "code"), [("float16", "e"), ("float32", "f")])
def test_an_array_is_read_with_and_without_numpy(dtype: str, code: str) -> None:
    numpy = pytest.importorskip("numpy")
    numbers = [0.5, -1.25, 3.0, 0.0, 2.0, -7.5]
    data = base64.b64encode(struct.pack(f"<6{code}", *numbers)).decode()
    array = Array(shape=(1, 3, 2), dtype=dtype, data=data)
    assert array.tolist() == [[[0.5, -1.25], [3.0, 0.0], [2.0, -7.5]]]
    same = numpy.asarray(array)
    assert (same.dtype, same.shape) == (dtype, (1, 3, 2))
    assert same.tolist() == array.tolist()


def test_a_flat_array_is_a_flat_list() -> None:
    data = base64.b64encode(struct.pack("<2f", 1.0, 2.0)).decode()
    assert Array(shape=(2,), dtype="float32", data=data).tolist() == [1.0, 2.0]


PART = {"uri": "s3://photos/a.tar", "etag": "x", "offset": 512, "length": 9}


@pytest.mark.parametrize(
    ("fields", "wrong"),
    [
        ({"length": None}, "offset and length go together"),
        ({"offset": None}, "offset and length go together"),
        ({"etag": None}, "need an etag or a version_id"),
        ({"offset": -1}, "offset"),
        ({"length": 0}, "length"),
        ({"length": 2**63}, "length"),
        ({"uri": "https://photos.example/a.tar"}, "offset is for s3:// references"),
    ],
)
def test_a_part_of_an_object_is_whole_and_pinned(fields: dict[str, Any], wrong: str) -> None:
    assert ImageRef.model_validate(PART).is_part
    with pytest.raises(ValidationError, match=wrong):
        ImageRef.model_validate({**PART, **fields})


def test_an_index_holds_no_parts_of_objects() -> None:
    with pytest.raises(ValidationError, match="an index holds whole objects"):
        EmbedRequest.model_validate({"image": PART, "index": "pets"})
