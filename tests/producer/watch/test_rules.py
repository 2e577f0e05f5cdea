"""rules.toml is checked whole, and says which objects become which jobs."""

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from blipq import InvalidRequest
from blipq.watch.objects import Upload
from blipq.watch.rules import Rule, Rules, Source, load
from conftest import ROOT

AT = datetime(2026, 11, 25, tzinfo=UTC)
RULE = {"name": "captions", "bucket": "photos", "request": {"kind": "caption"}}


def upload(key: str = "in/cat.jpg", size: int = 1000, **fields: Any) -> Upload:
    return Upload(
        **{"bucket": "photos", "key": key, "etag": "e1", "size": size, "modified": AT} | fields
    )


def rule(**fields: Any) -> Rule:
    return Rule.model_validate(RULE | fields)


@pytest.mark.parametrize(
    ("fields", "taken", "left"),
    [
        ({"prefix": "in/"}, upload("in/a"), upload("out/a")),
        ({"suffix": ".jpg"}, upload("a.JPG"), upload("a.png")),
        ({"suffix": [".jpg", ".png"]}, upload("a.png"), upload("a.gif")),
        ({"min_size": "1 kB"}, upload(size=1000), upload(size=999)),
        ({"max_size": "1 KiB"}, upload(size=1024), upload(size=1025)),
        ({"max_size": "1.5kb"}, upload(size=1500), upload(size=1501)),
        ({}, upload(size=1), upload(size=0)),
        ({}, upload("a"), upload("folder/")),
        ({"bucket": "photos"}, upload(), upload(bucket="others")),
        (
            {"content_type": "image/*"},
            upload(content_type="image/png"),
            upload(content_type="text/html"),
        ),
        ({"content_type": "image/png"}, upload(content_type="image/PNG; q=1"), upload()),
    ],
)
def test_a_rule_takes_uploads(fields: dict[str, Any], taken: Upload, left: Upload) -> None:
    assert rule(**fields).takes(taken)
    assert not rule(**fields).takes(left)


def test_a_job_is_about_exactly_these_bytes() -> None:
    request, options = rule().job(upload(version_id="v1"), watch="w")
    assert request.image.model_dump(exclude_none=True) == {
        "uri": "s3://photos/in/cat.jpg",
        "version_id": "v1",
        "etag": "e1",
    }
    assert options.idempotency_key is not None
    assert options.idempotency_key.startswith("watch:w:captions:")


def test_an_upload_has_one_key_per_version_and_rule() -> None:
    def key(rule: Rule, upload: Upload, watch: str = "w") -> str | None:
        return rule.job(upload, watch=watch)[1].idempotency_key

    one = key(rule(), upload())
    assert key(rule(), upload(version_id="v1", content_type="image/png")) == one
    others = [
        key(rule(), upload(etag="e2")),
        key(rule(), upload(modified=AT.replace(second=1))),
        key(rule(), upload("other.jpg")),
        key(rule(name="other"), upload()),
        key(rule(), upload(), watch="other"),
    ]
    assert len({one, *others}) == 6


def test_templates_place_results_beside_and_name_the_upload() -> None:
    options = {
        "output": "s3://results/{bucket}/{stem}.{etag}.json",
        "metadata": {"key": "{key}", "name": "{name}", "version": "{version_id}"},
        "webhook": "https://example.org/hook",
    }
    _, made = rule(options=options).job(upload("in/a.b/cat {x}.tar.jpg"), watch="w")
    assert made.output == "s3://results/photos/in/a.b/cat {x}.tar.e1.json"
    assert made.metadata == {
        "key": "in/a.b/cat {x}.tar.jpg",
        "name": "cat {x}.tar.jpg",
        "version": "null",
    }
    assert made.webhook is not None


@pytest.mark.parametrize(
    ("key", "stem"),
    [("a/b.jpg", "a/b"), ("a.b/c", "a.b/c"), (".hidden", ".hidden"), ("a/.hidden", "a/.hidden")],
)
def test_a_stem_is_the_key_without_its_ending(key: str, stem: str) -> None:
    _, made = rule(options={"output": "s3://results/{stem}"}).job(upload(key), watch="w")
    assert made.output == f"s3://results/{stem}"


def test_a_hostile_key_is_compared_with_a_sidecars_form_in_no_time() -> None:
    """Whoever uploads chooses the key: each further field once took a thousand times as long."""
    form = "s3://photos/{name}-{stem}-{etag}-{version_id}-{name}.json"
    rules = Rules.model_validate({"name": "w", "rules": [RULE | {"options": {"output": form}}]})
    assert not rules.is_sidecar("photos", "-" * 1000 + ".png")
    assert rules.is_sidecar("photos", "-" * 1000 + ".json")
    assert rules.is_sidecar("photos", "a-b-c-d-e-f.json.json")
    assert not rules.is_sidecar("photos", "a-b-c-d.json")


def test_our_own_sidecars_are_known_by_their_form() -> None:
    rules = Rules.model_validate(
        {"name": "w", "rules": [RULE | {"options": {"output": "s3://photos/{stem}.json"}}]}
    )
    assert rules.is_sidecar("photos", "in/cat.json")
    assert rules.is_sidecar("photos", "in/cat.json.heat.png"), "what is drawn is no upload"
    assert not rules.may_take("photos", "in/cat.json")
    assert rules.may_take("photos", "in/cat.jpg")
    assert not rules.is_sidecar("photos", "in/catXjson")


def test_places_to_list_are_not_inside_one_another() -> None:
    rules = [
        RULE | {"name": f"r{n}", "bucket": bucket, "prefix": prefix}
        for n, (bucket, prefix) in enumerate(
            [("b-1", "x/"), ("b-1", "x/y/"), ("b-1", "x/"), ("c-1", ""), ("c-1", "z/")]
        )
    ]
    assert Rules.model_validate({"name": "w", "rules": rules}).places == [
        ("b-1", "x/"),
        ("c-1", ""),
    ]


GOOD = """
name = "uploads"
[[rules]]
name = "captions"
bucket = "photos"
request = { kind = "caption" }
"""


@pytest.fixture
def loaded(tmp_path: Path) -> Callable[[str], Rules]:
    def loaded(text: str) -> Rules:
        path = tmp_path / "rules.toml"
        path.write_text(text, "utf-8")
        return load(path)

    return loaded


@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_a_good_file_is_read(loaded: Callable[[str], Rules], mark: str) -> None:
    """Some editors mark UTF-8 at the start of a file."""
    assert loaded(mark + GOOD).rules[0].name == "captions"


def test_metadata_may_hold_any_key(loaded: Callable[[str], Rules]) -> None:
    (rule,) = loaded(GOOD + 'options = { metadata = { key = "{key}" } }').rules
    longest = "k" * 1024
    _, options = rule.job(Upload("photos", longest, "e", 1, datetime.now(UTC)), watch="w")
    assert options.metadata == {"key": longest}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (GOOD.replace('"photos"', '"photos'), "line 5"),
        (GOOD.replace("photos", "p"), "rules.0.bucket: 'p' is no name"),
        (GOOD.replace("bucket", "buckets"), "rules.0.bucket: missing"),
        (GOOD + "sufix = '.jpg'", "rules.0.sufix: unknown; did you mean suffix?"),
        (GOOD + "min_size = 'big'", "rules.0.min_size: 'big' is not a size"),
        (GOOD + "max_size = '20 MB or so'", "rules.0.max_size: '20 MB or so' is not a size"),
        (GOOD + "max_size = '10 bit'", "rules.0.max_size: '10 bit' is not a size"),
        (GOOD + "max_size = '1.2.3 MB'", "rules.0.max_size: "),
        (GOOD + "min_size = -1", "rules.0.min_size: "),
        (GOOD.replace('caption" }', 'captoin" }'), "request."),
        (GOOD.replace('"caption" }', '"vqa" }'), "request.vqa.questions: missing"),
        (GOOD.replace(" }", ', image = "s3://b/k" }'), "request.image: leave it out"),
        (GOOD + 'options = { priority = "urgent" }', "options.priority"),
        (GOOD + 'options = { prio = "high" }', "options.prio: unknown; did you mean priority?"),
        (GOOD + 'options = { output = "s3://r/{kez}" }', "'kez' is not one of bucket, key"),
        (GOOD + 'options = { output = "s3://r/{key" }', "write {{ for a brace"),
        (GOOD + 'options = { output = "/tmp/{name}" }', "options.output"),
        (GOOD + 'options = { output = "s3://photos/{key}" }', "replace the upload itself"),
        (GOOD + 'options = { webhook = "nonsense" }', "options.webhook"),
        (GOOD + 'options = { idempotency_key = "k" }', "leave it out"),
        (GOOD.replace('name = "uploads"', ""), "name: missing"),
        (GOOD + GOOD.replace('name = "uploads"', ""), "two rules have the name 'captions'"),
        (GOOD + '[source]\nqueue = "photos"', "source.queue: a queue is the URL"),
        (GOOD + '[source]\nevery = "soon"', "source.every: 'soon' is not a duration"),
        ('name = "uploads"', "rules: missing"),
        ("name = uploads", "rules.toml is no TOML: Invalid value (at line 1"),
        (GOOD.replace('"caption"', '"captoin"'), "rules.0: request.kind must be one of caption"),
    ],
)
def test_what_is_wrong_is_told_with_its_place(
    loaded: Callable[[str], Rules], text: str, told: str
) -> None:
    with pytest.raises(InvalidRequest) as raised:
        loaded(text)
    assert told in str(raised.value)
    assert "rules.toml" in str(raised.value)


def test_a_file_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="No such file"):
        load(tmp_path / "none.toml")


def test_the_example_is_the_one_in_the_docs_and_is_right() -> None:
    text = (ROOT / "examples" / "uploads" / "rules.toml").read_text()
    shown = text.partition("\n\n")[2]
    assert f"```toml\n{shown}```" in (ROOT / "docs" / "uploads.md").read_text()
    rules = load(ROOT / "examples" / "uploads" / "rules.toml")
    photo = upload("incoming/products/cat.jpg", content_type="image/jpeg")
    outputs = [rule.job(photo, watch="w")[1].output for rule in rules.rules if rule.takes(photo)]
    assert outputs == [
        "s3://blipq-outputs/incoming/products/cat.jpg.json",
        "s3://blipq-outputs/incoming/products/cat.answers.json",
    ]


def test_the_page_names_every_field() -> None:
    page = (ROOT / "docs" / "uploads.md").read_text()
    fields = {**Rules.model_fields, **Rule.model_fields, **Source.model_fields}
    assert [name for name in fields if name not in page] == []
