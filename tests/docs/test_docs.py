"""What the pages say is so: generated pages are fresh, messages are taken, names exist."""

import json
import re
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
import typer
from celery import Celery
from jsonschema import Draft202012Validator

from blipq import ErrorCode, Settings
from blipq.cli import app as cli
from blipq.cli.commands import loaded
from blipq.ledger.connection import connect
from blipq.local.sample import red_square
from blipq.local.stack import LocalStack
from blipq.s3.storage import Storage
from blipq_api.settings import ApiSettings
from blipq_worker.catalog.s3.keys import ModelS3Settings
from blipq_worker.settings import WorkerSettings
from conftest import ROOT, start_worker, wait_for_worker, wait_until

DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md"))]
#: Read from the environment elsewhere than in the settings.
OTHER_VARIABLES = {"BLIPQ_STACK_FILE", "BLIPQ_REDIS_PASSWORD", "BLIPQ_S3_", "BLIPQ_MODEL_S3_"}
OTHER_VARIABLES |= {"BLIPQ_LOG_LEVEL", "BLIPQ_LOG_FORMAT"}
OTHER_VARIABLES |= {"BLIPQ_KEY"}  # of examples/http


@pytest.fixture(scope="module")
def served(
    stack: LocalStack, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Settings, str]]:
    """A real worker with random weights on a Redis database of its own, and an image for it."""
    from worker.tiny_models import save_opt

    fields = stack.settings_fields()
    fields["redis_url"] = fields["redis_url"].removesuffix("/0") + "/2"
    settings = Settings.model_validate(fields)
    folder = tmp_path_factory.mktemp("foreign")
    worker = start_worker(
        stack,
        folder / "worker.log",
        redis_url=settings.redis_url,
        models=f"default={save_opt(folder / 'opt')}",
        canary="0",
        dtype="float32",
    )
    wait_for_worker(worker, settings)
    yield settings, Storage(settings).upload(red_square()).uri
    worker.stop(timeout=30)
    with connect(settings) as raw:
        assert not [key for key in raw.scan_iter("blipq:*") if raw.ttl(key) == -1]


@pytest.fixture
def raw(served: tuple[Settings, str]) -> Iterator["redis.Redis"]:
    with connect(served[0]) as client:
        yield client


def schema(name: str) -> Draft202012Validator:
    return Draft202012Validator(json.loads((DOCS / "schemas" / f"{name}.json").read_text()))


def block(page: Path, language: str) -> str:
    found = re.search(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    assert found is not None
    return found[1]


def ended(raw: "redis.Redis", id: str) -> dict[str, str]:
    key = f"blipq:job:{id}"
    wait_until(lambda: raw.hget(key, "completed_at"), f"the end of {id}")
    return raw.hgetall(key)


def message(id: str, *arguments: Any) -> dict[str, Any]:
    """The message of docs/other-languages.md, with other arguments."""
    text = block(DOCS / "other-languages.md", "json message")
    told: dict[str, Any] = json.loads(text.replace(json.loads(text)["headers"]["id"], id))
    told["properties"]["delivery_tag"] = str(uuid.uuid4())
    told["body"] = json.dumps([[id, *arguments], {}, {}])
    return told


@pytest.mark.parametrize("generator", ["configuration", "schemas", "cli", "layout", "openapi"])
def test_generated_pages_are_fresh(generator: str) -> None:
    command = [sys.executable, "-m", f"tools.docs.{generator}", "--check"]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stderr


def test_a_plain_celery_client_sends_a_job_and_reads_its_result(
    served: tuple[Settings, str], raw: "redis.Redis"
) -> None:
    settings, image = served
    code = block(DOCS / "other-languages.md", "python")
    code = code.replace("redis://:password@redis.internal:6379/0", settings.redis_url)
    code = code.replace("s3://photos/cat.jpg", image)
    names: dict[str, Any] = {}
    exec(compile(code, "other-languages.md", "exec"), names)
    celery: Celery = names["app"]
    celery.close()
    job = ended(raw, names["id"])
    assert job["status"] == "succeeded", job
    assert json.loads(job["metadata"]) == {"order": "42"}
    schema("vqa-request").validate(names["request"])
    schema("options").validate(names["options"])
    schema("vqa-result").validate(json.loads(job["result"]))
    schema("receipt").validate(json.loads(job["receipt"]))


def test_the_documented_message_is_taken_from_a_plain_list(
    served: tuple[Settings, str], raw: "redis.Redis"
) -> None:
    id = f"job_{uuid.uuid4()}"
    pubsub: Any = raw.pubsub(ignore_subscribe_messages=True)  # type: ignore[no-untyped-call]
    pubsub.subscribe("blipq:ended:foreign")
    raw.lpush("blipq.default.normal", json.dumps(message(id, {"image": served[1]})))
    job = ended(raw, id)
    assert job["status"] == "succeeded", job
    assert job["notify"] == "blipq:ended:foreign"
    schema("caption-result").validate(json.loads(job["result"]))
    heard: list[str] = []

    def told() -> bool:
        heard.append((pubsub.get_message(timeout=0.1) or {}).get("data", ""))
        return id in heard

    wait_until(told, "the notification")
    pubsub.close()


def test_the_same_message_twice_is_one_job(
    served: tuple[Settings, str], raw: "redis.Redis"
) -> None:
    id = f"job_{uuid.uuid4()}"
    for _ in range(2):
        text = json.dumps(message(id, {"image": served[1]}))
        raw.lpush("blipq.default.normal", text)
    first = ended(raw, id)
    wait_until(lambda: not raw.llen("blipq.default.normal"), "the second message")
    assert (ended(raw, id)["completed_at"], first["attempts"]) == (first["completed_at"], "1")


def test_a_foreign_job_that_makes_no_sense_fails_with_the_field(
    served: tuple[Settings, str], raw: "redis.Redis"
) -> None:
    id = f"job_{uuid.uuid4()}"
    raw.lpush("blipq.default.normal", json.dumps(message(id, {"picture": served[1]})))
    job = ended(raw, id)
    error = json.loads(job["error"])
    schema("job-error").validate(error)
    assert (job["status"], error["code"]) == ("failed", "invalid_request")
    assert "picture" in error["message"]


def test_the_schemas_refuse_what_the_contract_refuses() -> None:
    wrong = {"image": "s3://bucket/key", "questions": []}
    assert not schema("vqa-request").is_valid(wrong)
    assert not schema("options").is_valid({"prio": "high"})
    assert schema("match-request").is_valid({"image": {"uri": "s3://bucket/key"}, "texts": "a cat"})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", [*PAGES, ROOT / "Makefile"], ids=lambda page: page.name)
def test_tests_that_are_named_exist(page: Path) -> None:
    """A file without a folder is one of tests/guarantees."""
    for folder, name in re.findall(r"(tests/[\w/]*|\b)(test_\w+\.py)", page.read_text()):
        path = ROOT / (folder or "tests/guarantees") / name
        assert path.is_file(), path.relative_to(ROOT)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_and_options_that_are_named_exist(page: Path) -> None:
    group = typer.main.get_command(cli)
    for line in re.findall(
        r"(?:^    |`)(?:[\w./]+=\S+ )*blipq ([a-z][^`\n]*)", page.read_text(), re.M
    ):
        words = line.partition("#")[0].split()
        command: Any = group
        while words and hasattr(command, "commands"):
            if words[0].startswith("-") and command.invoke_without_command:
                break
            name = words.pop(0)
            assert name in command.commands, f"blipq {line}"
            command = loaded(command.commands[name])
        options = {
            option for each in command.params for option in (*each.opts, *each.secondary_opts)
        }
        given = {word.partition("=")[0] for word in words if word.startswith("--")}
        assert given <= options, f"blipq {line}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_settings_that_are_named_exist(page: Path) -> None:
    fields = ApiSettings.model_fields | WorkerSettings.model_fields | ModelS3Settings.model_fields
    known = {f"BLIPQ_{name.upper()}" for name in fields} | OTHER_VARIABLES | {"BLIPQ_"}
    named = set(re.findall(r"BLIPQ_[A-Z0-9_]*", page.read_text()))
    assert named <= known, named - known


def test_every_script_of_the_ledger_is_described() -> None:
    text = (DOCS / "architecture.md").read_text()
    scripts = sorted((ROOT / "producer" / "blipq" / "ledger" / "scripts").glob("*.lua"))
    names = {path.stem for path in scripts} - {"common"}
    assert not [name for name in names if f"`{name}`" not in text]


@pytest.mark.parametrize("page", ["other-languages.md", "troubleshooting.md"])
def test_every_error_code_is_explained(page: str) -> None:
    text = (DOCS / page).read_text()
    assert not [code for code in ErrorCode if f"`{code}`" not in text]


def test_the_policies_are_json_and_allow_only_objects() -> None:
    text = (DOCS / "production.md").read_text()
    policies = re.findall(r"^```json\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    assert len(policies) == 2
    for policy in policies:
        for statement in json.loads(policy)["Statement"]:
            assert statement["Effect"] == "Allow"
            assert "*" not in "".join(statement["Action"])


def test_the_documented_measurement_runs() -> None:
    command = [sys.executable, "-m", "tools.docs.job_bytes", "200"]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    found = [int(number) for number in re.findall(r": (\d+) bytes", ran.stdout)]
    assert all(500 < number < 6000 for number in found)
    queued, kept, compactly_queued, compactly_kept = found
    assert (compactly_queued, compactly_kept) < (queued, kept)


@pytest.mark.parametrize("name", ["CONTRIBUTING.md", "docs/architecture.md"])
def test_files_and_folders_that_are_named_exist(name: str) -> None:
    """A name may leave out the folders before it, as the text around it says them."""
    roots = [ROOT / name for name in ("producer", "api", "worker", "datasets")]
    paths = [path for root in roots for path in root.rglob("*")]
    known = {f"/{path.relative_to(ROOT)}" for path in paths} | {"/tests", "/tools", "/benchmarks"}
    text = (ROOT / name).read_text()
    for named in re.findall(r"`([\w/]+(?:\.py|\.lua|/))`", text):
        tail = f"/{named.removesuffix('/')}"
        assert (ROOT / named).exists() or any(path.endswith(tail) for path in known), named
