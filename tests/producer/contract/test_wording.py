"""What is wrong with a request is said in words of a request, not of the library that found it."""

import re
from typing import Any

import pytest
from pydantic import ValidationError

from blipq import CaptionRequest, InvalidRequest, MatchRequest, Options, SearchRequest, VQARequest
from blipq.contract import Request, request_adapter
from blipq.settings import Settings
from blipq.submission import checked, explain, uploadable

IMAGE = "s3://uploads/cat.jpg"
#: How pydantic begins its own sentences.
OF_PYDANTIC = re.compile(r"[Ii]nput should|should have|should match|[Ff]ield required|Value error")


def told(model: Any, /, **fields: Any) -> str:
    with pytest.raises(InvalidRequest) as raised:
        checked(model, **fields)
    assert not OF_PYDANTIC.search(str(raised.value))
    return str(raised.value)


@pytest.mark.parametrize(
    ("model", "fields", "sentence"),
    [
        (VQARequest, {"image": IMAGE}, "questions: missing"),
        (VQARequest, {"image": IMAGE, "questions": []}, "questions: must not be empty"),
        (VQARequest, {"image": IMAGE, "questions": " \n"}, "questions.0: must not be blank"),
        (VQARequest, {"image": IMAGE, "questions": [5]}, "questions.0: must be a text"),
        (VQARequest, {"image": IMAGE, "questions": 5}, "questions: must be a list"),
        (
            VQARequest,
            {"image": IMAGE, "questions": ["q"] * 65},
            "questions: takes at most 64, not 65",
        ),
        (
            VQARequest,
            {"image": IMAGE, "questions": "q", "choices": ["red"]},
            "choices: needs at least 2, not 1",
        ),
        (
            VQARequest,
            {"image": IMAGE, "questions": "x" * 4097},
            "questions.0: takes at most 4,096 characters",
        ),
        (CaptionRequest, {"image": IMAGE, "best_of": 0}, "best_of: must be at least 1"),
        (CaptionRequest, {"image": IMAGE, "best_of": 1.5}, "best_of: must be a whole number"),
        (
            CaptionRequest,
            {"image": IMAGE, "generation": {"do_sample": "perhaps", "temperature": 0}},
            "generation.do_sample: must be true or false; "
            "generation.temperature: must be greater than 0",
        ),
        (MatchRequest, {"image": IMAGE, "texts": ["a"], "head": "x"}, "head: must be itm or itc"),
        (Options, {"priority": "urgent"}, "priority: must be high, normal or low"),
        (Options, {"expires_in": "31d"}, "expires_in: must be at most 2,592,000"),
        (Options, {"metadata": 5}, "metadata: must be an object with named fields"),
        (Options, {"metadata": {"n": 5}}, "metadata.n: must be a text"),
        (Options, {"idempotency_key": "\ud83d"}, "idempotency_key: half of a surrogate pair"),
        (Options, {"output": "s3://a-b/\ud83d"}, "output: half of a surrogate pair"),
        (Options, {"model": "a b"}, "model: a name is letters, digits"),
        (
            Options,
            {"webhook": {"url": "https://a.org", "events": ["job.done"]}},
            "webhook.events.0: must be job.running, job.succeeded",
        ),
        (
            SearchRequest,
            {"index": "i", "text": "t", "filter": {"a": 5}},
            "filter.a: must be a text; filter.a: must be a list",
        ),
    ],
)
def test_a_wrong_field_is_told_in_words_of_a_request(
    model: Any, fields: dict[str, Any], sentence: str
) -> None:
    assert told(model, **fields).startswith(sentence)


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        ({"kind": "captoin"}, "request: kind must be one of caption, vqa, match, embed, describe"),
        ({}, "request: kind is missing: one of caption, vqa, match"),
        ({"kind": "caption"}, "caption.image: missing"),
    ],
)
def test_a_request_of_no_known_kind_is_told_which_there_are(asked: Any, sentence: str) -> None:
    with pytest.raises(ValidationError) as raised:
        request_adapter.validate_python(asked)
    assert explain(raised.value, Request).startswith(sentence)


def test_a_list_is_not_called_too_short_for_what_is_wrong_inside_it() -> None:
    webhook = {"url": "https://a.org", "events": ["job.done"]}
    assert "; " not in told(Options, webhook=webhook)


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("BLIPQ_MAX_OPEN_JOBS", "0", "must be at least 1"),
        ("BLIPQ_LOCAL_PATHS", "perhaps", "must be true or false"),
        ("BLIPQ_INDEXES", "photos", "s3://bucket/prefix is expected, or a folder"),
        ("BLIPQ_INDEXES", "s3://a/b", "'a' is no name of a bucket"),
        ("BLIPQ_REDIS_URL", "http://localhost", "it begins with one of redis://"),
        ("BLIPQ_S3_ENDPOINT_URL", "localhost:9000", "it begins with http:// or https://"),
    ],
)
def test_a_wrong_setting_is_told_by_the_name_of_its_variable(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, sentence: str
) -> None:
    monkeypatch.setenv(name, value)
    assert told(Settings).startswith(f"{name}: {sentence}")


def test_an_argument_of_a_client_is_told_by_its_own_name() -> None:
    assert told(Settings, max_open_jobs=0) == "max_open_jobs: must be at least 1"


def test_keys_and_endpoints_lose_the_line_end_of_the_file_they_came_from() -> None:
    settings = Settings(
        s3_endpoint_url="http://minio:9000\n", s3_access_key_id="id\n", s3_secret_access_key="s\r\n"
    )
    assert (settings.s3_endpoint, settings.s3_access_key_id) == ("http://minio:9000", "id")
    assert settings.s3_secret_access_key is not None
    assert settings.s3_secret_access_key.get_secret_value() == "s"


@pytest.mark.parametrize(
    ("image", "sentence"),
    [
        ("", "image: must not be empty"),
        (" \n", "image: must not be empty"),
        ("data:image/png;base64," + "iVBOR" * 2000, "image: a data: URL is not read: decode it"),
        (
            "arn:aws:s3:::photos/2026/1.jpg",
            "image: 'arn:aws:s3:::photos/2026/1.jpg' is an ARN: write s3://photos/2026/1.jpg",
        ),
        (5, "image: a text, a Path, bytes or an ImageRef, not int"),
    ],
)
def test_what_is_no_image_is_refused_before_anything_is_read(image: Any, sentence: str) -> None:
    with pytest.raises(InvalidRequest) as raised:
        uploadable(image, local_paths=True)
    assert str(raised.value).startswith(sentence)
    assert len(str(raised.value)) < 200


@pytest.mark.parametrize("partition", ["aws", "aws-cn", "aws-us-gov"])
def test_where_an_s3_uri_belongs_an_arn_is_answered_with_it(partition: str) -> None:
    arn = f"arn:{partition}:s3:::photos/2026/1.jpg"
    sentence = f"{arn!r} is not of the form s3://bucket/key: write s3://photos/2026/1.jpg"
    assert told(CaptionRequest, image=arn) == f"image.uri: {sentence}"
    assert told(Options, output=arn) == f"output: {sentence}"


def test_an_arn_that_names_no_object_is_answered_with_the_form_alone() -> None:
    arn = "arn:aws:s3:eu-west-1:123456789012:accesspoint/photos/object/1.jpg"
    assert told(Options, output=arn) == f"output: {arn!r} is not of the form s3://bucket/key"
