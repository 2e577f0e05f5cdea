"""``blipq models compare`` and ``record-golden`` on jobs of a real worker."""

import json
import os
from pathlib import Path

import pytest

from blipq import Client, Settings
from blipq.local.sample import red_square
from blipq.local.stack import LocalStack
from blipq.local.supervisor import Service
from conftest import blipq, start_worker, wait_for_worker
from worker.compare.candidates import changed, copied, scaled


@pytest.fixture(scope="module")
def served(stack: LocalStack, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of commands, where a worker has run a job of each kind."""
    fields = stack.settings_fields()
    fields["redis_url"] = fields["redis_url"].removesuffix("/0") + "/5"
    settings = Settings.model_validate(fields)
    worker: Service = start_worker(
        stack,
        tmp_path_factory.mktemp("worker") / "worker.log",
        redis_url=settings.redis_url,
        dtype="float32",
    )
    try:
        wait_for_worker(worker, settings)
        with Client(settings) as client:
            jobs = [
                client.caption(red_square()),
                client.vqa(red_square(), "what color is the square?"),
                client.match(red_square(), ["a red square", "a blue circle"]),
                client.embed(red_square(), index="photos"),
            ]
            for job in jobs:
                job.result(timeout=60)
            client.search("photos", text="a red square").result(timeout=60)
    finally:
        worker.stop(timeout=30)
    return {"BLIPQ_REDIS_URL": settings.redis_url, "OMP_NUM_THREADS": "1"}


def test_an_unchanged_candidate_passes(
    stack: LocalStack, served: dict[str, str], tmp_path: Path
) -> None:
    page = tmp_path / "page.html"
    what = copied(tmp_path / "candidate")
    ran = blipq("models", "compare", what, "--report", str(page), stack=stack, **served)
    assert ran.returncode == 0, ran.stderr
    assert "0 of 5 jobs changed" in ran.stdout
    assert "Nothing changed in 5 jobs" in page.read_text()


def test_a_changed_candidate_is_refused_and_not_recorded(
    stack: LocalStack, served: dict[str, str], tmp_path: Path
) -> None:
    what = changed(tmp_path / "candidate", "opt", scaled("vision_model.encoder.layers.2.", 1.02))
    page, goldens = tmp_path / "page.html", tmp_path / "goldens.json"
    options = ["--report", str(page), "--jobs", "3"]
    ran = blipq("models", "compare", what, *options, "--json", stack=stack, **served)
    assert ran.returncode == 1, ran.stderr
    found = json.loads(ran.stdout)
    assert (found["jobs"], found["changed_jobs"]) == (3, 2)
    kinds = {pair["kind"] for pair in found["worst"]}
    assert kinds == {"embed", "match"}, "a search by text looks at no picture"
    assert page.read_text().count("<article>") == 2

    recording = ["models", "record-golden", what, "--output", str(goldens), *options]
    ran = blipq(*recording, "--against", "default", stack=stack, **served)
    assert ran.returncode == 1, ran.stdout
    assert "2 of 3 jobs changed against demo" in ran.stderr
    assert not goldens.exists()
    ran = blipq(*recording, "--accept", stack=stack, **served, BLIPQ_MODELS="default=demo")
    assert ran.returncode == 0, ran.stderr
    assert "2 of 3 jobs changed against demo" in ran.stderr
    assert what in json.loads(goldens.read_text())


def test_what_a_file_holds_of_a_model_is_not_replaced_by_another_ones(tmp_path: Path) -> None:
    what, file = copied(tmp_path / "mine"), tmp_path / "goldens.json"
    recording = ["models", "record-golden", what, "--output", str(file), "--dtype", "float32"]
    assert blipq(*recording).returncode == 0
    before = file.read_bytes()
    assert blipq(*recording).returncode == 0, "it says the same"
    changed(tmp_path / "other", "opt", scaled("language_projection.", 3.0))
    os.replace(tmp_path / "other/opt/model.safetensors", tmp_path / "mine/opt/model.safetensors")
    ran = blipq(*recording)
    assert ran.returncode == 1, ran.stdout
    assert "has another one: it" in ran.stderr
    assert file.read_bytes() == before
    assert blipq(*recording, "--accept").returncode == 0
    assert file.read_bytes() != before
