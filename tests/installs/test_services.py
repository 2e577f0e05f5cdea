"""A service has a Celery of its own; the client goes beside it, and submits for real."""

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest

from blipq.local.stack import LocalStack
from blipq.local.supervisor import Service
from blipq.s3.storage import Storage
from conftest import ROOT, wait_until
from installs.conftest import Environment, run

pytestmark = [pytest.mark.installs, pytest.mark.timeout(300)]

#: What is the service's, not blipq's, to choose.
OWN = ("celery", "kombu", "redis")

#: What services pin: both ends of each range, and what pip takes for a Celery alone.
SERVICES = {
    "the oldest": ("celery[redis]==5.4.0", "kombu==5.4.0", "redis==5.0.8"),
    "Celery 5.4": ("celery[redis]==5.4.*", "kombu<5.7"),  # 5.7 refuses redis-py below 6.1
    "Celery 5.5": ("celery[redis]==5.5.*",),
    "the oldest Celery 5.6": ("celery[redis]==5.6.0", "kombu==5.6.0", "redis==5.2.1"),
    "Celery 5.6": ("celery[redis]==5.6.*",),
    "Celery 5.7": ("celery[redis]==5.7.*",),
}

SUBMIT = """
import asyncio, json, sys
from celery import Celery
from blipq import AsyncClient, CaptionRequest, Client, Settings

async def ask(image):
    async with AsyncClient() as client:
        job = await client.vqa(image, "what color is the circle?")
        return (await job.result(timeout=60)).answers[0].text

app = Celery("service", broker=Settings().redis_url)
app.send_task("tasks.own", queue="own")
with Client() as client:
    image = client.storage.upload("docs/scene.png")
    many = client.submit_many([CaptionRequest(image=image) for _ in range(5)])
    texts = [job.result(timeout=60).text for job in many]
    texts.append(client.caption(image).result(timeout=60).text)
    cancelled = client.caption(image, model="nobody")
    cancelled.cancel()
    ended = cancelled.wait(timeout=10).status
answer = asyncio.run(ask(image))
print(json.dumps({"texts": texts, "answer": answer, "cancelled": ended}))
"""


@pytest.fixture(scope="session")
def constraints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The versions of everything that is not the service's: nothing is resolved anew."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    others = [line for line in lines if line.partition("==")[0].lower() not in OWN]
    path = tmp_path_factory.mktemp("constraints") / "constraints.txt"
    path.write_text("\n".join(others) + "\n")
    return path


@pytest.mark.parametrize("service", SERVICES)
def test_a_service_submits_beside_its_own_celery(
    service: str,
    new_environment: Callable[[], Environment],
    wheels: dict[str, Path],
    constraints: Path,
    stack: LocalStack,
    worker: Service,
) -> None:
    environment = new_environment()
    pinned = ("--quiet", "-c", str(constraints))
    environment.pip("install", *pinned, *SERVICES[service])
    before = environment.versions(*OWN)
    environment.pip("install", *pinned, str(wheels["producer"]))
    assert environment.versions(*OWN) == before
    environment.pip("check")
    submits(environment, stack)


def test_pip_finds_what_goes_with_celery_5_4(
    new_environment: Callable[[], Environment],
    wheels: dict[str, Path],
    constraints: Path,
    stack: LocalStack,
    worker: Service,
) -> None:
    """For that Celery alone pip takes a kombu that refuses its redis-py: nothing is published."""
    environment = new_environment()
    requirements = ("celery[redis]==5.4.*", str(wheels["producer"]))
    environment.pip("install", "--quiet", "-c", str(constraints), *requirements)
    submits(environment, stack)


#: The client's tests of what differs between versions of redis-py: connections and their errors.
OF_CONNECTIONS = (
    *("test_redis_url", "test_sentinel", "test_tls", "test_ledger"),
    *("test_notifier", "test_async_notifier", "test_async_client"),
)


def test_the_clients_own_tests_pass_with_the_oldest_versions(
    new_environment: Callable[[], Environment], wheels: dict[str, Path], constraints: Path
) -> None:
    """With redis-py 5.0.3 an error did not say that a certificate was wrong."""
    environment = new_environment()
    client = f"blipq[local] @ {wheels['producer'].as_uri()}"
    requirements = (*SERVICES["the oldest"], client, "pytest", "pytest-timeout")
    environment.pip("install", "--quiet", "-c", str(constraints), *requirements)
    files = [str(next((ROOT / "tests").rglob(f"{name}.py"))) for name in OF_CONNECTIONS]
    options = ("-q", "-p", "no:cacheprovider")
    ran = run([str(environment.python), "-m", "pytest", *options, *files])
    assert "passed" in ran
    assert "skipped" not in ran


def submits(environment: Environment, stack: LocalStack) -> None:
    """A service here submits jobs, and a worker with its own Celery runs them."""
    known = {"BLIPQ_KNOWN_MODELS": "nobody"}
    python = [str(environment.python), "-W", "error::ImportWarning", "-c", SUBMIT]
    told: dict[str, Any] = json.loads(run(python, **stack.environment(), **known))
    assert len(told["texts"]) == 6
    assert all("circle" in text for text in told["texts"]), told
    assert (told["answer"], told["cancelled"]) == ("red", "cancelled")


def test_the_client_is_small_and_has_no_weights(wheels: dict[str, Path]) -> None:
    assert wheels["producer"].stat().st_size <= 400_000
    names = zipfile.ZipFile(wheels["producer"]).namelist()
    others = ("blipq_api", "blipq_worker")
    assert not [name for name in names if name.startswith(others) or name.endswith("safetensors")]


def test_the_wheel_of_the_door_has_the_files_of_its_pages_and_their_licenses(
    wheels: dict[str, Path],
) -> None:
    names = {*zipfile.ZipFile(wheels["api"]).namelist()}
    folder = "blipq_api/console/vendored"
    files = {f"{folder}/{each.name}" for each in (ROOT / "api" / folder).iterdir()}
    assert len(files) > 5
    assert files <= names


def test_the_wheels_say_the_version_of_the_code_and_go_together(wheels: dict[str, Path]) -> None:
    import blipq

    parts = (("api", "blipq"), ("worker", "blipq[search]"), ("datasets", "blipq"))
    for name, needed in parts:
        folder = f"blipq_{name}-{blipq.__version__}.dist-info"
        metadata = zipfile.ZipFile(wheels[name]).read(f"{folder}/METADATA").decode()
        assert f"Requires-Dist: {needed}=={blipq.__version__}" in metadata.splitlines()
    assert wheels["producer"].name.split("-")[1] == blipq.__version__


def test_without_worker_and_door_the_client_says_what_to_install(
    new_environment: Callable[[], Environment], wheels: dict[str, Path], constraints: Path
) -> None:
    environment = new_environment()
    environment.pip("install", "--quiet", "-c", str(constraints), str(wheels["producer"]))
    for arguments in (["demo"], ["bench"], ["models", "list"], ["worker"]):
        with pytest.raises(AssertionError, match="wheel of blipq-worker"):
            run([str(environment.python), "-m", "blipq", *arguments])
    for arguments in (["api"], ["api", "keys", "new", "shop"]):
        with pytest.raises(AssertionError, match="wheel of blipq-api"):
            run([str(environment.python), "-m", "blipq", *arguments])


def test_the_door_answers_from_its_own_wheel_without_the_worker(
    new_environment: Callable[[], Environment],
    wheels: dict[str, Path],
    constraints: Path,
    stack: LocalStack,
    tmp_path: Path,
) -> None:
    environment = new_environment()
    files = (str(wheels["producer"]), str(wheels["api"]))
    environment.pip("install", "--quiet", "-c", str(constraints), *files)
    log = tmp_path / "door.log"
    command = [str(environment.python), "-m", "blipq", "api", "--port", "0"]
    door = Service("door", command, env=stack.environment(), log=log)
    door.start()
    try:
        wait_until(lambda: " is http://" in log.read_text(), "the door")
        url = log.read_text().rpartition(" is ")[2].split()[0]
        with httpx2.Client(base_url=url, timeout=30, trust_env=False) as http:
            assert http.get("/health").json() == {"status": "ok"}
            assert "<h1" in http.get("/console/").text
    finally:
        door.stop(timeout=30)


def test_indexes_are_filled_and_read_without_the_worker(
    new_environment: Callable[[], Environment],
    wheels: dict[str, Path],
    constraints: Path,
    stack: LocalStack,
    worker: Service,
    tmp_path: Path,
) -> None:
    environment = new_environment()
    search = f"blipq[search] @ {wheels['producer'].as_uri()}"
    environment.pip("install", "--quiet", "-c", str(constraints), search)
    folder = f"s3://{stack.settings().inbox_bucket}/installs/"
    stored = Storage(stack.settings())
    stored.put(
        f"{folder}scene.png", (ROOT / "docs/scene.png").read_bytes(), content_type="image/png"
    )

    def blipq(*arguments: str) -> str:
        command = [str(environment.python), "-m", "blipq", *arguments]
        return run(command, **stack.environment())

    assert "indexed" in blipq("index", folder, "--name", "installs")
    assert "installs" in blipq("index", "list")
    page = tmp_path / "hits.html"
    found = blipq("search", "a red circle", "--name", "installs", "--html", str(page))
    assert "scene.png" in found
    assert "data:image/jpeg;base64," in page.read_text()
    blipq("index", "delete", "installs")
    names = environment.pip("list", "--format", "freeze").lower().splitlines()
    assert not [
        name for name in names if name.startswith(("torch", "transformers", "blipq-worker"))
    ]
