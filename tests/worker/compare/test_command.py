"""``blipq models compare`` and ``record-golden`` on jobs of a real worker."""

import json
import os
from pathlib import Path

import pytest
import typer

from blipq import Client, Settings
from blipq.contract import CaptionRequest
from blipq.errors import InvalidRequest
from blipq.local.sample import red_square
from blipq.local.stack import LocalStack
from blipq.local.supervisor import Service
from blipq.redis.cells import cell_of
from blipq_worker.cli import upgrades
from blipq_worker.cli.refusing import refused
from blipq_worker.compare.cases import Case
from conftest import blipq, start_worker, wait_for_worker
from guarantees.cells.fleet import Fleet, finish
from worker.compare.candidates import CASES, changed, copied, guard, picture, scaled


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


def test_a_first_golden_is_recorded_where_there_is_no_job_to_replay(
    stack: LocalStack, tmp_path: Path
) -> None:
    what, file = copied(tmp_path / "mine"), tmp_path / "goldens.json"
    recording = ["models", "record-golden", what, "--output", str(file), "--dtype", "float32"]
    recording += ["--report", str(tmp_path / "page.html")]
    environment = {
        "BLIPQ_REDIS_URL": stack.settings().redis_url.removesuffix("/0") + "/6",
        "BLIPQ_MODELS": "default=demo",
        "OMP_NUM_THREADS": "1",
    }
    ran = blipq(*recording, stack=stack, **environment)
    assert ran.returncode == 2, ran.stderr
    assert "no job to replay; --accept records it without a comparison" in ran.stderr
    assert not file.exists()
    ran = blipq(*recording, "--accept", stack=stack, **environment)
    assert ran.returncode == 0, ran.stderr
    assert "not compared: there is no job to replay" in ran.stderr
    assert what in json.loads(file.read_text())


@pytest.mark.parametrize(
    ("environment", "code", "why"),
    [
        ({"BLIPQ_REDIS_URL": "redis://127.0.0.1:1/0"}, 7, "Redis"),
        ({"BLIPQ_MODELS": "default=demo,other=demo"}, 2, "serves several models"),
    ],
)
def test_what_keeps_a_golden_from_being_compared_is_named_with_the_way_out(
    stack: LocalStack, tmp_path: Path, environment: dict[str, str], code: int, why: str
) -> None:
    file = tmp_path / "goldens.json"
    recording = ["models", "record-golden", "opt-2.7b", "--output", str(file)]
    recording += ["--report", str(tmp_path / "page.html")]
    ran = blipq(*recording, stack=stack, **{"BLIPQ_MODELS": "default=demo", **environment})
    assert ran.returncode == code, ran.stderr
    assert why in ran.stderr
    assert "--accept records it without a comparison" in ran.stderr
    assert not file.exists()


@pytest.mark.parametrize(
    ("environment", "code", "why"),
    [
        ({"BLIPQ_REDIS_URL": "redis://127.0.0.1:1/0"}, 7, "Redis"),
        ({}, 2, "there is no job to replay"),
        ({"BLIPQ_MODELS": "default=demo,other=demo"}, 2, "serves several models"),
    ],
)
@pytest.mark.parametrize("as_json", [False, True])
def test_pipelines_tell_a_comparison_that_could_not_be_made_from_one_that_found_a_change(
    stack: LocalStack,
    tmp_path: Path,
    environment: dict[str, str],
    code: int,
    why: str,
    as_json: bool,
) -> None:
    page = tmp_path / "page.html"
    empty = stack.settings().redis_url.removesuffix("/0") + "/6"
    given = {"BLIPQ_REDIS_URL": empty, "BLIPQ_MODELS": "default=demo", **environment}
    command = ["models", "compare", "demo", "--report", str(page), *(["--json"] * as_json)]
    ran = blipq(*command, stack=stack, **given)
    assert ran.returncode == code, ran.stderr
    assert why in (json.loads(ran.stdout)["message"] if as_json else ran.stderr)
    assert not page.exists()


def test_jobs_of_all_cells_are_replayed(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path, "ab")
    try:
        with Client(fleet.settings()) as client:
            ids = [client.caption("s3://photos/cat.jpg").id for _ in range(20)]
        for id in ids:
            finish(fleet, id, str(cell_of(id)))
        assert {cell_of(id) for id in ids} == {"a", "b"}
        cases, skipped = upgrades._cases(fleet.settings(), None, 100, None)
        assert (sorted(case.name for case in cases), skipped) == (sorted(ids), [])
    finally:
        fleet.stop()


def test_lines_that_are_no_requests_are_not_compared(tmp_path: Path) -> None:
    manifest = tmp_path / "manifest.jsonl"
    manifest.write_text('{"kind": "caption"}\n')
    options = ["--manifest", str(manifest), "--report", str(tmp_path / "page.html")]
    ran = blipq("models", "compare", "demo", *options, BLIPQ_MODELS="default=demo")
    assert ran.returncode == 2, ran.stderr
    assert "line 1" in ran.stderr


@pytest.mark.parametrize("name", ["", "absent/page.html", "."])
def test_a_page_that_cannot_be_written_is_refused_before_a_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(typer.Exit) as ended:
        upgrades.compare("nothing-that-could-be-loaded", report=Path(name))
    assert ended.value.exit_code == 2
    assert "blipq models: --report: " in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_what_a_stranger_named_an_image_moves_no_cursor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hostile = Case("gone\x1b[2J\x9b1A", CaptionRequest(image=picture(99)))
    comparison = guard(tmp_path / "pictures").compare("demo", "demo", [hostile, CASES[0]])
    monkeypatch.setattr(upgrades, "_compared", lambda *_: comparison)
    upgrades.compare("demo", report=tmp_path / "page\x1b[2J.html")
    with pytest.raises(typer.Exit), refused():
        raise InvalidRequest("there is no job to replay: gone\x1b[2J")
    printed = "".join(capsys.readouterr())
    assert "were not compared: gone" in printed
    assert "no job to replay: gone" in printed
    assert "the page: " in printed
    assert not {"\x1b", "\x9b"} & set(printed)
