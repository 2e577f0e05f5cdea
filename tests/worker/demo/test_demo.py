"""The demo: its scores, its report, and that it leaves nothing behind."""

import base64
import dataclasses
import io
import json
import os
import re
import signal
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from blipq import cli
from blipq.contract import (
    Answer,
    Array,
    Caption,
    CaptionResult,
    ErrorCode,
    JobError,
    JobInfo,
    Kind,
    MatchResult,
    Receipt,
    Result,
    Status,
    TextScore,
    VQAResult,
)
from blipq_worker.cli import demo as demo_command
from blipq_worker.demo.plots import round_up, stage_plot, throughput_plot
from blipq_worker.demo.report import milliseconds, percent, render_report
from blipq_worker.demo.run import choose
from blipq_worker.demo.score import Answered, Case, Explained, Run, Tally, cases_of
from blipq_worker.demo.signals import SIGNALS, Interrupted, Signals
from conftest import blipq, wait_until

START = datetime(2026, 1, 1, tzinfo=UTC)
#: Links of the report to the HTTP door of the local stack: nothing is loaded from it.
DOOR = "http://127.0.0.1:"


def answered(case: Case, result: Result | None, *, seconds: float = 1.0) -> Answered:
    """A job that ended so long after the start; without a result it failed."""
    gone = JobError(code=ErrorCode.IMAGE_NOT_FOUND, message="gone")
    return Answered(
        case,
        JobInfo(
            id="job_1",
            kind=case.kind,
            model="default",
            status=Status.SUCCEEDED if result else Status.FAILED,
            created_at=START,
            completed_at=START + timedelta(seconds=seconds),
            expires_at=START,
            result=result,
            error=None if result else gone,
            receipt=Receipt(queue_ms=700, fetch_ms=3, dtype="float32", quantization="none"),
        ),
    )


#: How sure a model was of each text.
SURE: dict[str, Any] = {"mean_token_probability": 0.876, "finish_reason": "stop"}


def answer_to(case: Case, text: str | None = None) -> Result:
    """The right answer, or the one given."""
    if case.kind is Kind.CAPTION:
        return CaptionResult(captions=(Caption(text=text or case.expected, **SURE),))
    if case.kind is Kind.VQA:
        return VQAResult(answers=(Answer(question=case.text, text=text or case.expected, **SURE),))
    score = 0.9 if (text or case.expected) == "match" else 0.1
    return MatchResult(head="itm", scores=(TextScore(text=case.text, score=score),))


def run_of(*, wrong: int = 0, failed: int = 0, pictures: int = 10) -> Run:
    """A run whose first answers are wrong and whose next jobs failed."""
    shown = choose(pictures, seed=1)
    cases = [one for place, about in enumerate(shown) for one in cases_of(place, about)]
    answers = []
    for place, one in enumerate(cases):
        opposite = "no match" if one.expected == "match" else "match"
        result = answer_to(one, opposite if place < wrong else None)
        gone = wrong <= place < wrong + failed
        answers.append(answered(one, None if gone else result, seconds=0.1 * (place + 1)))
    return Run(1, shown, answers, machine="a machine", command="blipq demo --seed 1")


def case_of(kind: Kind, text: str = "", expected: str = "red") -> Case:
    return Case(0, kind, str(kind), text, expected)


# --- the scores -----------------------------------------------------------------------------------


def test_every_picture_gets_six_jobs_with_known_answers() -> None:
    (shown,) = choose(1, seed=3)
    cases = list(cases_of(0, shown))
    assert [one.kind for one in cases] == ["caption", *3 * ["vqa"], *2 * ["match"]]
    assert [one.expected for one in cases[-2:]] == ["match", "no match"]
    assert cases[0].expected == shown.caption


def test_the_same_seed_shows_the_same_different_pictures() -> None:
    assert choose(20, seed=5) == choose(20, seed=5)
    assert len({about.scene.seed for about in choose(20, seed=5)}) == 20
    assert choose(20, seed=5) != choose(20, seed=6)


@pytest.mark.parametrize("kind", [Kind.CAPTION, Kind.VQA])
def test_texts_are_right_only_to_the_letter(kind: Kind) -> None:
    case = case_of(kind)
    assert answered(case, answer_to(case, "red")).mark == "right"
    assert answered(case, answer_to(case, "Red")).mark == "wrong"


@pytest.mark.parametrize(("score", "said"), [(0.51, "match"), (0.5, "no match"), (0.1, "no match")])
def test_a_text_matches_above_one_half(score: float, said: str) -> None:
    result = MatchResult(head="itm", scores=(TextScore(text="a cat", score=score),))
    answer = answered(case_of(Kind.MATCH, expected="match"), result)
    assert answer.given == said
    assert answer.mark == ("right" if said == "match" else "wrong")


def test_a_failed_job_is_neither_right_nor_wrong() -> None:
    answer = answered(case_of(Kind.VQA), None)
    assert (answer.mark, answer.given) == ("failed", "image_not_found")
    assert Tally([answer]).checked == 0


@pytest.mark.parametrize(
    ("wrong", "failed", "passed"), [(0, 0, True), (3, 0, True), (4, 0, False), (0, 1, False)]
)
def test_a_pass_needs_95_percent_right_and_no_failure(
    wrong: int, failed: int, passed: bool
) -> None:
    assert run_of(wrong=wrong, failed=failed).tally.passed is passed


def test_no_job_is_not_a_pass() -> None:
    assert not Tally([]).passed


def test_the_summary_adds_up() -> None:
    summary = run_of(wrong=5, failed=2).summary()
    kinds = summary["by_kind"].values()
    assert summary["jobs"] == 60 == summary["succeeded"] + summary["failed"]
    assert summary["checked"] == 58 == sum(kind["checked"] for kind in kinds)
    assert summary["correct"] == 53 == sum(kind["correct"] for kind in kinds)
    assert summary["images_per_second"] == pytest.approx(10 / 6.0, abs=0.01)


# --- the report -----------------------------------------------------------------------------------


class Page(HTMLParser):
    """Every tag, and the text of every table row."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self._cell = False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self._cell = True

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self._cell = False

    def handle_data(self, data: str) -> None:
        if self._cell:
            self.rows[-1][-1] = f"{self.rows[-1][-1]} {data.strip()}".strip()

    def attributes(self, *names: str) -> Iterator[str]:
        """The values of these attributes anywhere."""
        for _, attributes in self.tags:
            yield from (value or "" for name, value in attributes.items() if name in names)


def test_the_report_loads_nothing_and_runs_nothing() -> None:
    html = render_report(run_of(wrong=2))
    page = Page(html)
    links = list(page.attributes("src", "href", "srcset", "action"))
    assert not any(link.startswith(DOOR) for link in page.attributes("src", "srcset", "action"))
    assert len(links) > 10
    assert all(link.startswith(("data:", "#", DOOR)) for link in links)
    assert not {"script", "iframe", "object", "base"} & {tag for tag, _ in page.tags}
    assert not re.search(r"@import|url\(", html)


def test_hostile_answers_stay_text() -> None:
    evil = "</td><script>alert(1)</script><img src=x onerror=alert(1)>"
    run = run_of()
    case = Case(0, Kind.VQA, "color", evil, evil)
    html = render_report(
        Run(1, run.shown, [answered(case, answer_to(case))], machine=evil, command=evil)
    )
    assert "<script" not in html
    assert "<img src=x" not in html
    assert html.count("&lt;script&gt;") == 5


def test_wrong_answers_are_marked_in_words() -> None:
    page = Page(render_report(run_of(wrong=3, failed=1)))
    marked = [row[2].split()[1] for row in page.rows if len(row) == 3 and row[2].startswith("✗")]
    assert marked == ["wrong", "wrong", "wrong", "failed"]
    classes = list(page.attributes("class"))
    assert classes.count("wrong") == 3
    assert classes.count("flawed") == 1
    assert "only-wrong" in page.attributes("id")


def explained(text: str, *words: str) -> Explained:
    """A text of the first picture, with maps that grow to the right."""
    maps = [share for _ in range(1 + len(words)) for _ in range(8) for share in range(8)]
    data = base64.b64encode(struct.pack(f"<{len(maps)}e", *(each / 7 for each in maps))).decode()
    map_ = Array(shape=(1 + len(words), 8, 8), dtype="float16", data=data)
    return Explained(0, TextScore(text=text, score=0.9, map=map_, words=words))


def test_the_report_shows_where_the_model_looked_for_a_text_and_for_each_of_its_words() -> None:
    run = dataclasses.replace(run_of(), explained=explained("a red cat", "a", "red", "cat"))
    html = render_report(run)
    assert "Where the model looked" in html
    drawn = re.findall(r'<img src="data:image/jpeg;base64,([^"]+)" alt="Heat map of ([^"]+)"', html)
    assert [name for _, name in drawn] == ["a red cat", "a", "red", "cat"]
    with Image.open(io.BytesIO(base64.b64decode(drawn[0][0]))) as picture:
        cold, hot = picture.getpixel((1, 1)), picture.getpixel((picture.width - 2, 1))
    assert cold[2] > cold[0], "blue"
    assert hot[0] > hot[2], "yellow"


def test_a_report_without_heat_maps_says_nothing_of_them() -> None:
    for missing in (None, Explained(0, TextScore(text="a cat", score=0.9))):
        html = render_report(dataclasses.replace(run_of(), explained=missing))
        assert "Where the model looked" not in html


def test_a_report_without_mistakes_offers_no_filter() -> None:
    html = render_report(run_of())
    assert 'id="only-wrong"' not in html
    assert "Not one answer is wrong." in html


def test_the_tables_of_the_report_add_up() -> None:
    rows = Page(render_report(run_of(wrong=4, failed=2))).rows
    counts = {row[0]: [int(cell) for cell in row[1:5]] for row in rows if row[1:2][0].isdigit()}
    assert counts["all"] == [60, 54, 4, 2]
    kinds = [counts[kind] for kind in ("caption", "vqa", "match")]
    assert [sum(column) for column in zip(*kinds, strict=True)] == counts["all"]
    topics = [row for name, row in counts.items() if name not in {"all", "caption", "vqa", "match"}]
    assert [sum(column) for column in zip(*topics, strict=True)] == counts["vqa"]


def test_every_picture_says_what_it_shows() -> None:
    page = Page(render_report(run_of()))
    alts = [attributes["alt"] for tag, attributes in page.tags if tag == "img"]
    assert len(alts) == 10
    assert all(alt and alt.startswith(("A", "An")) and "background" in alt for alt in alts)


def test_a_run_in_which_every_job_failed_still_has_a_report() -> None:
    assert "0</strong> of 0 answers right" in render_report(run_of(failed=60))


def test_all_answers_are_in_the_throughput_plot() -> None:
    plot = throughput_plot([0.1 * n for n in range(1, 61)])
    assert plot is not None
    step = 6.0 / len(plot.bars)
    top = float(plot.rates[-1].label)
    assert sum(bar.height / 100 * top * step for bar in plot.bars) == pytest.approx(60, rel=0.05)
    assert all(0 <= bar.height <= 100 for bar in plot.bars)
    assert throughput_plot([]) is None


def test_stages_that_no_receipt_tells_of_are_left_out() -> None:
    rows = stage_plot(run_of().answers).rows
    assert [row.name for row in rows] == ["queue", "fetch"]
    assert all(0 <= row.p50_at <= row.p95_at <= 100 for row in rows)


def test_numbers_read_well_and_never_flatter() -> None:
    assert (percent(1.0), percent(0.9999), percent(0.95)) == ("100 %", "99.9 %", "95 %")
    assert (milliseconds(3.14), milliseconds(31.4), milliseconds(3141)) == (
        *("3.1 ms", "31 ms"),
        "3.14 s",
    )
    assert [round_up(value) for value in (0.11, 2.2, 3, 10)] == [0.2, 2.5, 5, 10]


# --- signals --------------------------------------------------------------------------------------


@pytest.fixture
def signals() -> Iterator[Signals]:
    """Signals that are watched for the length of a test."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    watched = Signals()
    watched.watch()
    yield watched
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_signal_whose_exception_is_lost_is_remembered(signals: Signals) -> None:
    """A demo went on to its end: the exception was raised in a callback and lost."""
    with suppress(Interrupted):
        signal.raise_signal(signal.SIGTERM)
    with pytest.raises(Interrupted) as caught:
        signals.check()
    assert caught.value.number == signal.SIGTERM


def test_a_first_signal_waits_until_the_servers_have_started(signals: Signals) -> None:
    """A server was started but not yet known when Ctrl-C came: it outlived its folder."""
    started = []

    def start() -> None:
        with signals.held():
            signal.raise_signal(signal.SIGINT)
            started.append("server")

    with pytest.raises(Interrupted):
        start()
    assert started == ["server"]


def test_a_second_signal_does_not_wait(signals: Signals) -> None:
    with suppress(Interrupted), signals.held():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        pytest.fail("the second signal waited")


# --- the command ----------------------------------------------------------------------------------


@pytest.fixture
def demo(tmp_path: Path) -> Iterator[Callable[..., "subprocess.Popen[str]"]]:
    """Starts a demo whose temporary files are in ``tmp_path / "tmp"``."""
    (tmp_path / "tmp").mkdir()
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: str) -> "subprocess.Popen[str]":
        command = [sys.executable, "-m", "blipq", "demo", *arguments]
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        environment = {**os.environ, "TMPDIR": str(tmp_path / "tmp")}
        process = subprocess.Popen(command, env=environment, cwd=tmp_path, text=True, **pipes)
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def commands_with(text: str) -> list[str]:
    """The command lines that contain the text."""
    listed = subprocess.run(["ps", "-wweo", "args"], capture_output=True, text=True, check=True)
    return [line for line in listed.stdout.splitlines() if text in line]


def left_behind(tmp_path: Path) -> list[str]:
    """Files and processes of a demo that are still there."""
    return [*map(str, (tmp_path / "tmp").iterdir()), *commands_with(str(tmp_path / "tmp"))]


def test_a_demo_answers_every_job_and_cleans_up(
    demo: Callable[..., "subprocess.Popen[str]"], checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    """Random weights: all jobs succeed, nearly all answers are wrong, so it must not pass."""
    model = f"{checkpoints['opt']}+{checkpoints['itm']}"
    process = demo("--json", "--images", "2", "--seed", "7", "--model", model)
    output, progress = process.communicate(timeout=60)
    (line,) = output.splitlines()
    summary = json.loads(line)
    assert process.returncode == 1, progress
    assert (summary["jobs"], summary["succeeded"], summary["failed"]) == (12, 12, 0)
    assert (summary["seed"], summary["quantization"]) == (7, "none")
    assert Path(summary["report"]) == tmp_path / "demo-report.html"
    assert "--images 2 --seed 7" in (tmp_path / "demo-report.html").read_text()
    assert left_behind(tmp_path) == []


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_demo_leaves_nothing_behind(
    demo: Callable[..., "subprocess.Popen[str]"], tmp_path: Path, number: int, code: int
) -> None:
    process = demo("--json")
    wait_until(lambda: commands_with(f"mini -dir={tmp_path}/tmp"), "the S3 server")
    process.send_signal(number)
    output, _ = process.communicate(timeout=30)
    assert (process.returncode, output) == (code, "")
    assert left_behind(tmp_path) == []
    assert not (tmp_path / "demo-report.html").exists()


def test_a_worker_that_cannot_load_the_model_says_so(
    demo: Callable[..., "subprocess.Popen[str]"], tmp_path: Path
) -> None:
    process = demo("--json", "--images", "1", "--model", str(tmp_path / "nothing"))
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "neither a folder here nor a hub id" in json.loads(output)["message"]
    assert left_behind(tmp_path) == []


def test_a_report_that_cannot_be_written_is_told_at_once() -> None:
    process = blipq("demo", "--report", "/nowhere/report.html")
    assert process.returncode == 1
    assert "cannot write the report" in process.stderr


def test_a_missing_part_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_command, "NEEDED", ("json", "no_such_part"))
    outcome = CliRunner().invoke(cli.app, ["demo"])
    assert outcome.exit_code == 1
    assert "pip install '.[worker,local]'" in outcome.stderr


def test_demo_shows_its_options() -> None:
    shown = blipq("demo", "--help").stdout
    for option in ("--images", "--seed", "--quantization", "--report", "--json", "--model"):
        assert option in shown


def test_the_report_says_how_sure_each_text_was() -> None:
    run = run_of()
    shown = render_report(run).count("<small>0.88</small>")
    assert shown == sum(answer.case.kind is not Kind.MATCH for answer in run.answers)
