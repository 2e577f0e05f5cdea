"""The command: results on stdout, messages on stderr, stable exit codes."""

import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer
from pydantic import ValidationError
from typer.testing import CliRunner, Result

from blipq import Client, QueueUnavailable, Settings
from blipq.cli import app
from blipq.cli.commands import COMMANDS as TOLD
from blipq.cli.commands import loaded
from blipq.cli.terminal import several
from blipq.cli.terminal.group import split_help
from blipq.cli.terminal.output import Terminal, spinner_line
from blipq.contract import Kind, Options, Request, Status, request_adapter
from blipq.ledger.operator import OperatorLedger
from blipq.ledger.worker import Claim, WorkerLedger
from blipq.local.stack import free_port
from blipq.program import blipq
from blipq.submission import explain
from conftest import wait_until

IMAGE = "s3://uploads/cat.jpg"
CAPTION = {"kind": "caption", "captions": [{"text": "a [red] cat"}]}
VQA = {
    "kind": "vqa",
    "answers": [{"question": "why?", "text": "a"}, {"question": "how?", "text": "b"}],
}
MATCH = {"kind": "match", "head": "itm", "scores": [{"text": "a cat", "score": 0.9876}]}
CHOSEN = {
    "kind": "vqa",
    "answers": [
        {
            "question": "why?",
            "text": "a",
            "choices": [{"text": "a", "probability": 0.75}, {"text": "b", "probability": 0.25}],
        }
    ],
}
UNSURE = {
    "kind": "vqa",
    "answers": [
        {
            "question": "why?",
            "text": "a",
            "choices": [{"text": "a", "probability": 0.4}, {"text": "b", "probability": 0.35}],
            "uncertain": True,
        }
    ],
}
DOUBTED = {
    "kind": "caption",
    "captions": [
        {"text": "a cat", "mean_token_probability": 0.412, "uncertain": True},
        {"text": "a dog", "mean_token_probability": 0.9, "finish_reason": "stop"},
    ],
}
EMBED = {
    "kind": "embed",
    "arrays": {"image_embeds": {"shape": [32, 768], "dtype": "float16", "data": ""}},
}
ERROR = {"code": "image_not_found", "message": "no such key", "retryable": False}

Run = Callable[..., Result]


@pytest.fixture
def environment(apart: Settings, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    variables = {
        "BLIPQ_REDIS_URL": apart.redis_url,
        "BLIPQ_KNOWN_MODELS": ",".join(apart.known_models),
        "BLIPQ_S3_ENDPOINT_URL": str(apart.s3_endpoint_url),
        "BLIPQ_S3_ACCESS_KEY_ID": str(apart.s3_access_key_id),
        "BLIPQ_S3_SECRET_ACCESS_KEY": apart.s3_secret_access_key.get_secret_value(),
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    return variables


@pytest.fixture
def run(environment: dict[str, str]) -> Run:
    """The command in this process."""
    return lambda *arguments: CliRunner().invoke(app, list(arguments))


def succeeded(client: Client, ledger: WorkerLedger, result: dict[str, Any]) -> str:
    """The id of a job with this result."""
    job = client.caption(IMAGE)
    claim = ledger.claim(job.id, "w1")
    assert isinstance(claim, Claim)
    ledger.succeed(claim, json.dumps(result), json.dumps({"note": "only shapes"}))
    return job.id


def failed(client: Client, ledger: WorkerLedger) -> str:
    job = client.caption(IMAGE)
    claim = ledger.claim(job.id, "w1")
    assert isinstance(claim, Claim)
    ledger.fail(claim, json.dumps(ERROR), "{}")
    return job.id


# --- results --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("result", "lines"),
    [
        (CAPTION, "a [red] cat\n"),
        (VQA, "why?  a\nhow?  b\n"),
        (MATCH, "0.988  a cat\n"),
        (CHOSEN, "0.750  a\n0.250  b\n"),
        (UNSURE, "0.400  a  (uncertain)\n0.350  b\n"),
        (DOUBTED, "a cat  (uncertain: 0.41)\na dog\n"),
        ({"kind": "describe", "caption": CAPTION, "match": MATCH}, "a [red] cat\n0.988  a cat\n"),
        (EMBED, "image_embeds  float16 (32, 768)\n"),
    ],
)
def test_a_result_is_printed_for_people(
    run: Run, client: Client, ledger: WorkerLedger, result: dict[str, Any], lines: str
) -> None:
    ran = run("result", succeeded(client, ledger, result))
    assert (ran.exit_code, ran.stdout) == (0, lines)


def test_which_services_are_used_and_what_to_know_is_told_on_stderr(
    run: Run, client: Client, ledger: WorkerLedger, apart: Settings
) -> None:
    ran = run("result", succeeded(client, ledger, CAPTION))
    assert f"using {apart.endpoints}" in ran.stderr
    assert "note: only shapes" in ran.stderr


def test_json_is_one_object_on_stdout_and_silence_on_stderr(
    run: Run, client: Client, ledger: WorkerLedger
) -> None:
    ran = run("result", succeeded(client, ledger, CAPTION), "--json")
    info = json.loads(ran.stdout)
    assert (info["status"], info["result"]["captions"][0]["text"]) == ("succeeded", "a [red] cat")
    assert ran.stderr == ""


@pytest.fixture
def captioned(client: Client, ledger: WorkerLedger) -> Iterator[list[str]]:
    """Has every job captioned with the name of its image, but those of "none"; their ids."""
    done: list[str] = []
    stop = threading.Event()

    def work() -> None:
        while not stop.wait(0.02):
            for info in OperatorLedger.beside(client.ledger).jobs(status=Status.QUEUED):
                claim = ledger.claim(info.id, "w1")
                assert isinstance(claim, Claim)
                name = str(info.image).rpartition("/")[2]
                result = {"kind": "caption", "captions": [{"text": f"a {name}"}]}
                if name == "none":
                    ledger.fail(claim, json.dumps(ERROR), "{}")
                else:
                    ledger.succeed(claim, json.dumps(result), "{}")
                done.append(info.id)

    thread = threading.Thread(target=work)
    thread.start()
    yield done
    stop.set()
    thread.join()


@pytest.mark.usefixtures("captioned")
def test_several_images_are_captioned_in_their_order(run: Run) -> None:
    images = [f"s3://uploads/{number}" for number in range(3)]
    ran = run("caption", *images)
    assert ran.exit_code == 0
    assert ran.stdout.splitlines() == [f"{image}: a {image[-1]}" for image in images]


def test_images_from_stdin_are_a_bounded_number_of_jobs_at_a_time(
    run: Run, captioned: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(several, "MOST_OPEN", 2)
    ahead: list[int] = []

    def lines() -> Iterator[str]:
        for number in range(12):
            ahead.append(number - len(captioned))
            yield f"s3://uploads/{number}\n"

    monkeypatch.setattr(several, "sys", SimpleNamespace(stdin=lines()))
    ran = run("caption", "-")
    assert max(ahead) <= several.MOST_OPEN + 1
    assert ran.stdout.splitlines() == [f"s3://uploads/{n}: a {n}" for n in range(12)]


def test_a_stdin_without_images_is_told(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(several, "sys", SimpleNamespace(stdin=["\n"]))
    assert "no image came from stdin" in run("caption", "-").stderr
    assert run("caption", "-", "--json").stderr == ""


@pytest.mark.usefixtures("captioned")
def test_of_several_images_one_that_fails_stops_no_other(run: Run, tmp_path: Path) -> None:
    missing = str(tmp_path / "missing.jpg")
    images = ["s3://uploads/1", missing, "s3://uploads/none", "s3://uploads/2"]
    ran = run("caption", *images, "--json")
    assert ran.exit_code == 2, "of the first that failed"
    lines = [json.loads(line) for line in ran.stdout.splitlines()]
    assert {each["source"]: each.get("status") for each in lines} == {
        "s3://uploads/1": "succeeded",
        missing: None,
        "s3://uploads/none": "failed",
        "s3://uploads/2": "succeeded",
    }
    told = run("caption", *images)
    assert told.stdout.splitlines() == ["s3://uploads/1: a 1", "s3://uploads/2: a 2"]
    assert "missing.jpg" in told.stderr
    assert "s3://uploads/none: image_not_found" in told.stderr


def test_what_is_of_one_job_is_refused_for_several(run: Run, client: Client) -> None:
    for option in ("--idempotency-key", "--output"):
        ran = run("caption", IMAGE, IMAGE, option, "s3://blipq-outputs/1.json")
        assert ran.exit_code == 2
        assert f"{option} is of one image" in ran.stderr
    assert OperatorLedger.beside(client.ledger).jobs() == []


def test_nobody_has_to_wait(run: Run, client: Client) -> None:
    ran = run("caption", IMAGE, "--no-wait")
    assert client.job(ran.stdout.strip()).status() == "queued"
    as_json = run("caption", IMAGE, "--no-wait", "--json")
    assert client.job(json.loads(as_json.stdout)["id"]).status() == "queued"


def test_every_option_of_a_job_can_be_given(run: Run, client: Client) -> None:
    options = ["--model", "m", "--priority", "high", "--expires-in", "10m"]
    options += ["--idempotency-key", "k", "--output", "s3://results/1.json"]
    options += ["--webhook", "https://example.org/hook", "--metadata", "a=1", "--metadata", "b=2=3"]
    ran = run("caption", IMAGE, "--no-wait", "--set", "num_beams=2", "--best-of", "3", *options)
    doubting = run("vqa", IMAGE, "why?", "--no-wait", "--min-confidence", "0.5")
    asked = client.ledger.redis.hgetall(f"blipq:job:{doubting.stdout.strip()}")
    assert json.loads(asked["request"])["min_confidence"] == 0.5
    assert asked["contract"] == "4"
    job = client.ledger.redis.hgetall(f"blipq:job:{ran.stdout.strip()}")
    assert job["webhook_url"] == "https://example.org/hook"
    assert json.loads(job["metadata"]) == {"a": "1", "b": "2=3"}
    assert (job["queue"], job["output"]) == ("blipq.m.high", "s3://results/1.json")
    request = json.loads(job["request"])
    assert (request["generation"], request["best_of"]) == ({"num_beams": 2}, 3)
    assert int(job["deadline"]) - int(job["created_at"]) == 600_000


def test_every_verb_takes_every_option_of_a_job() -> None:
    commands: Any = typer.main.get_command(app)
    verbs = [name for name in commands.commands if name in set(Kind)]
    assert {"caption", "vqa", "match"} <= set(verbs)
    for name in verbs:
        taken = {param.name for param in loaded(commands.commands[name]).params}
        assert set(Options.model_fields) | {"timeout", "wait", "as_json"} <= taken, name


@pytest.mark.parametrize(
    "arguments", [("vqa", IMAGE, "why?", "how?"), ("match", IMAGE, "a cat", "--head", "itc")]
)
def test_questions_and_texts_are_submitted(
    run: Run, client: Client, arguments: tuple[str, ...]
) -> None:
    ran = run(*arguments, "--no-wait")
    assert client.job(ran.stdout.strip()).info().kind == arguments[0]


def test_a_local_file_is_uploaded(run: Run, client: Client, tmp_path: Path) -> None:
    (tmp_path / "cat.png").write_bytes(b"a cat")
    ran = run("caption", str(tmp_path / "cat.png"), "--no-wait")
    assert ran.exit_code == 0, ran.output
    assert "s3://blipq-inbox/" in client.ledger.redis.hget(
        f"blipq:job:{ran.stdout.strip()}", "request"
    )


def test_a_status_says_that_no_worker_lives(run: Run, client: Client) -> None:
    ran = run("status", client.caption(IMAGE, model="nobody").id)
    assert ran.exit_code == 0
    assert "queued, no live worker serves the model 'nobody'" in ran.stdout


NASTY = "s3://uploads/\x1b]0;owned\x07\x1b[2J\x9b31m all is well \x08\r.jpg"
HARMLESS = r"s3://uploads/\x1b]0;owned\x1b[2J\x9b31m all is well .jpg"


def test_a_terminal_obeys_nothing_of_what_a_job_says(
    run: Run, client: Client, ledger: WorkerLedger
) -> None:
    """A key of S3 may hold what clears a screen, renames a window or fills a clipboard."""
    found = {"id": NASTY, "itc": 0.5, "metadata": {"\x1b[5m": "\x1b[6m"}}
    id = succeeded(client, ledger, {"kind": "search", "hits": [found]})
    assert rf"{HARMLESS}  \x1b[5m=\x1b[6m" in run("result", id).stdout
    id = client.caption(IMAGE).id
    claim = ledger.claim(id, "w1")
    assert isinstance(claim, Claim)
    ledger.fail(claim, json.dumps(ERROR | {"message": f"{NASTY}: not found"}), "{}")
    for ran in (run("status", id), run("result", id)):
        assert HARMLESS in ran.output
        assert not re.search("\x1b(?!\\[[0-9;]*m)|[\x07\x08\r\x9b]", ran.output)


def test_a_terminal_obeys_nothing_of_what_is_waited_for() -> None:
    """The line beside a spinner; the console's own controls, which move its cursor, stay."""
    shown = io.StringIO()
    terminal = Terminal(file=shown, force_terminal=True, width=120)
    with terminal.status(NASTY):
        terminal.print("x")
    assert HARMLESS in shown.getvalue()
    assert "\x1b]0;" not in shown.getvalue()
    assert "\x1b[2K" in shown.getvalue()


def test_a_retried_job_says_what_went_wrong(run: Run, client: Client, ledger: WorkerLedger) -> None:
    id = client.caption(IMAGE).id
    claim = ledger.claim(id, "w1")
    assert isinstance(claim, Claim)
    error = {"code": "image_unavailable", "message": "HTTP 503", "retryable": True}
    ledger.retry(claim, 60, json.dumps(error))
    assert "queued, no live worker" in run("status", id).stdout
    assert "after image_unavailable: HTTP 503" in run("status", id).stdout
    ran = run("result", id, "--timeout", "0.1")
    assert "after image_unavailable: HTTP 503" in ran.stderr


def test_the_spinner_shows_the_reason_before_the_id(client: Client) -> None:
    """On 80 columns the id alone left no room for it."""
    info = client.caption(IMAGE, model="nobody").info()
    line = spinner_line(info)
    assert line.startswith("no live worker serves the model 'nobody'")
    assert line.endswith(f"({info.id})")


@pytest.mark.parametrize("as_json", [(), ("--json",)])
def test_the_status_of_a_failed_job_is_a_success(
    run: Run, client: Client, ledger: WorkerLedger, as_json: tuple[str, ...]
) -> None:
    ran = run("status", failed(client, ledger), *as_json)
    assert ran.exit_code == 0
    assert "image_not_found" in ran.stdout


def test_a_job_is_cancelled_once(run: Run, client: Client) -> None:
    id = client.caption(IMAGE).id
    assert run("cancel", id).stdout == "cancelled\n"
    assert run("cancel", id).stdout == "it had ended: cancelled\n"
    ran = run("cancel", id, "--json")
    assert json.loads(ran.stdout) == {"id": id, "cancelled": False, "status": "cancelled"}


# --- exit codes -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        ("caption", "ftp://example.org/cat.jpg"),
        ("caption", "/nonexistent.png"),
        ("caption", IMAGE, "--set", "num_beans=1"),
        ("caption", IMAGE, "--set", "num_beams"),
        ("caption", IMAGE, "--metadata", "lonely"),
        ("caption", IMAGE, "--webhook", "no-url"),
        ("caption", IMAGE, "--priority", "urgent"),
        ("caption", IMAGE, "--expires-in", "soon"),
        ("match", IMAGE, "a cat", "--head", "itx"),
        ("caption",),
        ("--nonsense",),
    ],
)
def test_a_wrong_request_exits_2(run: Run, arguments: tuple[str, ...]) -> None:
    ran = run(*arguments)
    assert (ran.exit_code, ran.stdout) == (2, "")
    assert ran.stderr


def test_a_job_whose_request_was_wrong_exits_2(
    run: Run, client: Client, ledger: WorkerLedger
) -> None:
    """As where the command itself can know it."""
    claim = ledger.claim(client.caption(IMAGE).id, "w1")
    assert isinstance(claim, Claim)
    error = {"code": "invalid_request", "message": "index: there is no index 'a'"}
    ledger.fail(claim, json.dumps(error), "{}")
    ran = run("result", claim.id)
    assert ran.exit_code == run("wait", claim.id).exit_code == 2
    assert ran.stderr.splitlines()[-1] == "blipq: index: there is no index 'a'"


def test_a_failed_job_exits_3(run: Run, client: Client, ledger: WorkerLedger) -> None:
    id = failed(client, ledger)
    ran = run("result", id)
    assert (ran.exit_code, ran.stdout) == (3, "")
    assert "blipq: image_not_found: no such key" in ran.stderr
    as_json = run("result", id, "--json")
    assert as_json.exit_code == 3
    assert json.loads(as_json.stdout)["code"] == "image_not_found"


@pytest.mark.parametrize("command", ["status", "result", "cancel"])
def test_an_unknown_job_exits_4(run: Run, command: str) -> None:
    ran = run(command, "job_unknown")
    assert (ran.exit_code, ran.stdout) == (4, "")
    assert json.loads(run(command, "job_unknown", "--json").stdout)["error"] == "JobNotFound"


def test_a_job_that_goes_on_exits_5_and_says_how_to_wait(run: Run) -> None:
    ran = run("caption", IMAGE, "--timeout", "0.1", "--model", "nobody")
    assert (ran.exit_code, ran.stdout) == (5, "")
    assert "no live worker" in ran.stderr
    assert "blipq result job_" in ran.stderr


def test_a_timeout_in_json_names_the_job(run: Run) -> None:
    """A program that gave up waiting must be able to go on with the same job."""
    ran = run("caption", IMAGE, "--timeout", "0.1", "--json")
    assert ran.exit_code == 5
    assert json.loads(ran.stdout)["job_id"].startswith("job_")


def test_a_cancelled_or_expired_job_exits_6(run: Run, client: Client) -> None:
    job = client.caption(IMAGE)
    job.cancel()
    assert run("result", job.id).exit_code == 6
    assert run("result", client.caption(IMAGE, expires_in="10ms").id).exit_code == 6


def test_services_that_are_down_exit_7(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BLIPQ_REDIS_URL", "redis://127.0.0.1:1/0")
    ran = run("status", "job_1")
    assert ran.exit_code == 7
    assert "Redis does not answer" in ran.stderr
    assert "correct its place in BLIPQ_REDIS_URL" in ran.stderr


def test_sentinels_that_are_down_are_told_in_one_short_line(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BLIPQ_REDIS_URL", "sentinel://127.0.0.1:1/0?master=m")
    told = run("status", "job_1").stderr.splitlines()[-1]
    assert "No master found for 'm': check the sentinels' places and ?master= in" in told


def test_settings_that_do_not_go_together_are_told_as_settings(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("BLIPQ_REDIS_URL")
    monkeypatch.setenv("BLIPQ_CELLS", "a=redis://127.0.0.1:1 b=redis://127.0.0.1:2")
    assert "blipq: settings: BLIPQ_CELL_LISTS must name" in run("status", "job_1").stderr


def test_whoever_named_no_redis_is_told_how_to_start_one(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    default = Settings.model_fields["redis_url"].default
    hint = "start a local stack with blipq up, or set BLIPQ_REDIS_URL"
    for url, told in ((f"redis://127.0.0.1:{free_port()}/0", False), (default, True)):
        monkeypatch.setenv("BLIPQ_REDIS_URL", url)
        with monkeypatch.context() as nobody:
            nobody.setattr("redis.connection.Connection._connect", _refused)
            ran = run("status", "job_1")
            assert ran.exit_code == 7
            assert (hint in ran.stderr) is told
            assert (hint in run("list", "--json").stdout) is told


def test_python_says_so_too(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(redis_url=Settings.model_fields["redis_url"].default)
    monkeypatch.setattr("redis.connection.Connection._connect", _refused)
    hint = "start a local stack with blipq up, or set BLIPQ_REDIS_URL"
    with Client(settings) as client, pytest.raises(QueueUnavailable, match=hint):
        client.job("job_1").info()


def _refused(_: Any) -> None:
    raise ConnectionRefusedError


def test_a_command_in_a_hint_can_be_typed_as_it_stands(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    started = tmp_path / "my tools" / "blipq"
    started.parent.mkdir()
    started.write_text("#!/bin/sh\n")
    started.chmod(0o755)
    monkeypatch.setattr("sys.argv", [str(started)])
    monkeypatch.setenv("PATH", str(tmp_path))
    assert blipq("up") == f"'{started}' up"
    monkeypatch.chdir(started.parent)
    for relative in ("./blipq", "../my tools/blipq"):
        monkeypatch.setattr("sys.argv", [relative])
        command, argument = shlex.split(blipq("up"))
        assert (Path(command).is_absolute(), Path(command).resolve()) == (True, started)
        assert argument == "up"
    monkeypatch.setenv("PATH", str(started.parent))
    assert blipq("up") == "blipq up"
    monkeypatch.setattr("sys.argv", ["service.py"])
    monkeypatch.setenv("PATH", "")
    assert blipq("up") == "blipq up"


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (
            "num_beam=3",
            "--set num_beam: unknown; did you mean num_beams? (accepted: max_new",
        ),
        (
            "colour=red",
            "--set colour: unknown (accepted: max_new_tokens, min_new",
        ),
        ("num_beams=99", "--set num_beams: must be at most 16"),
    ],
)
def test_a_wrong_generation_parameter_is_told_with_those_that_there_are(
    run: Run, given: str, told: str
) -> None:
    for verb in (("caption", IMAGE), ("vqa", IMAGE, "why?"), ("describe", IMAGE)):
        ran = run(*verb, "--set", given)
        assert ran.exit_code == 2
        assert told in ran.stderr


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"kind": "caption", "promt": "a"}, "caption.promt: unknown; did you mean prompt?"),
        ({"kind": "match", "text": ["a"]}, "match.text: unknown; did you mean texts?"),
        (
            {"kind": "vqa", "questions": ["a"], "history": [{"quest": "a", "answer": "b"}]},
            "vqa.history.0.quest: unknown; did you mean question? (accepted: question, answer)",
        ),
        (
            {"kind": "caption", "generation": {"num_beam": 1}},
            "caption.generation.num_beam: unknown; did you mean num_beams?",
        ),
    ],
)
def test_a_field_that_is_unknown_is_told_with_what_was_meant(
    asked: dict[str, Any], told: str
) -> None:
    with pytest.raises(ValidationError) as raised:
        request_adapter.validate_python({"image": IMAGE, **asked})
    assert told in explain(raised.value, Request)


@pytest.mark.parametrize(
    "asked",
    [
        {"kind": "caption", "p" * 10**6: 1},
        {"kind": "k" * 10**6},
        {"kind": "caption", **{f"promp{n}": n for n in range(10_000)}},
        {"kind": "caption", "priority": {"x" * 10**6: 1}},
        {"kind": "match", "texts": [{"x": "y"}] * 10_000},
    ],
)
def test_what_is_wrong_is_told_within_bounds(asked: dict[str, Any]) -> None:
    """The names are strangers', and the error goes into logs, into Redis and over a terminal."""
    with pytest.raises(ValidationError) as raised:
        request_adapter.validate_python({"image": IMAGE, **asked})
    assert len(explain(raised.value, Request)) < 10_000


def test_an_s3_that_is_down_exits_7(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("BLIPQ_S3_ENDPOINT_URL", "http://127.0.0.1:1")
    (tmp_path / "cat.png").write_bytes(b"a cat")
    ran = run("caption", str(tmp_path / "cat.png"))
    assert ran.exit_code == 7
    assert "S3 does not answer" in ran.stderr


def test_half_of_the_s3_credentials_exits_2_and_names_both(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("BLIPQ_S3_ACCESS_KEY_ID", "key")
    monkeypatch.delenv("BLIPQ_S3_SECRET_ACCESS_KEY", raising=False)
    (tmp_path / "cat.png").write_bytes(b"a cat")
    ran = run("caption", str(tmp_path / "cat.png"))
    assert ran.exit_code == 2
    assert "BLIPQ_S3_ACCESS_KEY_ID and BLIPQ_S3_SECRET_ACCESS_KEY" in ran.stderr


def test_a_wrong_setting_exits_2_with_one_line(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BLIPQ_TIMEOUT_S", "soon")
    ran = run("status", "job_1")
    assert ran.exit_code == 2
    assert ran.stderr.startswith("blipq: BLIPQ_TIMEOUT_S: 'soon' is not a duration")


def test_an_interrupt_exits_130(environment: dict[str, str], client: Client) -> None:
    job = client.caption(IMAGE)
    waiting = subprocess.Popen(
        [sys.executable, "-m", "blipq", "result", job.id],
        env={**os.environ, **environment},
        stderr=subprocess.PIPE,
        text=True,
    )
    assert waiting.stderr is not None
    assert waiting.stderr.readline().startswith("using")
    waiting.send_signal(signal.SIGINT)
    _, told = waiting.communicate(timeout=30)
    assert waiting.returncode == 130
    assert "Traceback" not in told


# --- a process of its own -------------------------------------------------------------------------


def process(*arguments: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-m", "blipq", *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_a_pipeline_gets_the_result_alone(
    environment: dict[str, str], client: Client, ledger: WorkerLedger
) -> None:
    id = succeeded(client, ledger, CAPTION)
    ran = process("result", id, environment=environment)
    assert (ran.returncode, ran.stdout) == (0, "a [red] cat\n")


def test_a_process_ends_soon_when_the_broker_is_frozen(
    environment: dict[str, str], own_redis: Settings
) -> None:
    """The job is recorded; nothing may keep the process, whatever the broker does."""
    from blipq.ledger.connection import connect

    with connect(own_redis) as raw:
        pid = raw.info("server")["process_id"]
    os.kill(pid, signal.SIGSTOP)
    try:
        started = time.monotonic()
        frozen = environment | {"BLIPQ_BROKER_URL": own_redis.redis_url}
        ran = process("caption", IMAGE, "--no-wait", environment=frozen)
        took = time.monotonic() - started
    finally:
        os.kill(pid, signal.SIGCONT)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith("job_")
    assert took < 10


def test_the_version_is_told(environment: dict[str, str]) -> None:
    assert process("--version", environment=environment).stdout == "blipq 0.1.0\n"


def test_an_early_interrupt_shows_no_traceback(environment: dict[str, str]) -> None:
    """Loading the command takes a while, and people change their minds."""
    early = subprocess.Popen(
        [sys.executable, "-m", "blipq_main", "status", "job_1"],
        env={**os.environ, **environment},
        stderr=subprocess.PIPE,
        text=True,
    )
    maps = Path(f"/proc/{early.pid}/maps")
    wait_until(lambda: early.poll() is not None or "pydantic_core" in maps.read_text(), "imports")
    early.send_signal(signal.SIGINT)
    _, told = early.communicate(timeout=30)
    assert early.returncode in (130, 4)
    assert "Traceback" not in told


def test_a_filter_gives_each_name_its_values(run: Run, client: Client) -> None:
    pairs = ("--filter", "by=Ann", "--filter", "by=Bob", "--filter", "year=2026")
    ran = run("search", "a cat", "--name", "pets", *pairs, "--no-wait")
    recorded = client.ledger.redis.hget(f"blipq:job:{ran.stdout.strip()}", "request")
    assert json.loads(str(recorded))["filter"] == {"by": ["Ann", "Bob"], "year": ["2026"]}
    refused = run("search", "a cat", "--name", "pets", "--filter", "year")
    assert (refused.exit_code, "NAME=VALUE" in refused.stderr) == (2, True)


@pytest.mark.parametrize(
    "arguments", [("s3://absent/2026/", "--name", "pets"), ("--name", "pets", "s3://absent/2026/")]
)
def test_indexing_needs_no_word_for_adding(run: Run, arguments: tuple[str, ...]) -> None:
    ran = run("index", *arguments)
    assert (ran.exit_code, "NoSuchBucket" in ran.stderr) == (2, True), ran.stderr
    assert "make it, or name another" in ran.stderr


def test_without_its_parts_indexing_says_what_to_install(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for arguments in (("index", "list"), ("search", "a cat", "--name", "pets", "--html", "x")):
        assert "pip install 'blipq[search]'" in run(*arguments).stderr


def test_help_shows_every_command_and_imports_none_of_them() -> None:
    code = (
        "import sys; from typer.testing import CliRunner; from blipq.cli import app\n"
        "shown = CliRunner().invoke(app, ['--help'], env={'COLUMNS': '200'}).stdout\n"
        "slow = ('blipq_worker', 'blipq.client', 'blipq.contract', 'redis', 'asyncio')\n"
        "print(shown, [name for name in sys.modules if name.startswith(slow)])"
    )
    command = [sys.executable, "-c", code]
    ran = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert ran.stdout.endswith(" []\n")
    assert all(text in ran.stdout for text in TOLD.values())


@pytest.mark.parametrize("name", TOLD)
def test_help_says_of_commands_what_they_say_themselves(name: str) -> None:
    group: Any = typer.main.get_command(app)
    stand_in = group.commands[name]
    command = loaded(stand_in)
    assert command is not stand_in
    assert (command.short_help or command.help).partition("\n")[0] == TOLD[name]


@pytest.mark.parametrize("arguments", [("api",), ("api", "keys", "new", "shop")])
def test_without_a_door_its_commands_say_what_to_install(
    run: Run, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...]
) -> None:
    monkeypatch.setattr("importlib.metadata.entry_points", lambda **_: [])
    ran = run(*arguments)
    assert ran.exit_code == 1
    assert "wheel of blipq-api" in ran.stderr


@pytest.mark.parametrize("arguments", [("demo", "--json"), ("models", "list"), ("worker",)])
def test_without_a_worker_its_commands_say_what_to_install(
    run: Run, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...]
) -> None:
    monkeypatch.setattr("importlib.metadata.entry_points", lambda **_: [])
    ran = run(*arguments)
    assert ran.exit_code == 1
    assert "wheel of blipq-worker" in (
        json.loads(ran.stdout)["message"] if "--json" in arguments else ran.stderr
    )


def every_command(group: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, each in group.commands.items():
        command = loaded(each)
        if hasattr(command, "commands"):
            yield from every_command(command, (*path, name))
        else:
            yield (*path, name), command


COMMANDS = dict(every_command(typer.main.get_command(app)))


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_every_command_has_help_with_examples(run: Run, path: tuple[str, ...]) -> None:
    ran = run(*path, "--help")
    assert ran.exit_code == 0
    assert "Usage:" in ran.stdout
    text, examples = split_help(COMMANDS[path].callback)
    assert text, "say in a docstring what the command does"
    assert examples, "end its docstring with 'Examples:' and a command line or more"
    assert all(f"blipq {' '.join(path)}" in line for line in examples)


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_help_breaks_no_word_and_no_example_on_a_terminal_of_80_columns(
    run: Run, path: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    shown = run(*path, "--help").stdout
    lines = [line.strip(" │") for line in shown.splitlines()]
    _, examples = split_help(COMMANDS[path].callback)
    assert set(examples) <= set(lines)
    assert not re.search(r"<[a-z][^>│\n]*│", shown), "a type or its choices go on in the next line"
    assert not [line for line in shown.splitlines() if len(line) > 80]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("caption", IMAGE, "--timeout", "soon"), "must be a number"),
        (("caption", IMAGE, "--priority", "urgent"), "'urgent' is not one of"),
        (("caption", IMAGE, "--best-of", "two"), "must be a whole number"),
        (("list", "--limit", "0"), "must be at least 1"),
        (("index", "add", "s3://b/", "--name", "a", "--priority", "x"), "'x' is not one of"),
        (("vqa", IMAGE, "why?", "--choice", "red"), "--choice: give two or more"),
    ],
)
def test_a_wrong_argument_is_told_in_words_of_a_request(
    run: Run, arguments: tuple[str, ...], told: str
) -> None:
    ran = run(*arguments)
    assert ran.exit_code == 2
    assert told in ran.stderr
    assert "Input should" not in ran.stderr
    assert "Value error" not in ran.stderr


def test_flags_have_no_type_and_commands_stand_in_groups(run: Run) -> None:
    assert "<bool>" not in "".join(run(*path, "--help").stdout for path in [(), *COMMANDS])
    shown = run("--help").stdout
    for panel in ("Ask about an image", "Follow jobs", "Many images", "Run it", "Operate it"):
        assert f"─ {panel} ─" in shown


def test_every_option_has_help() -> None:
    for path, command in COMMANDS.items():
        assert [param.name for param in command.params if not param.help] == [], path
