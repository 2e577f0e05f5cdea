"""A bulk from the first line to the results; the test plays the worker."""

import fcntl
import io
import json
import os
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import IO, Any

import pytest
from typer.testing import CliRunner, Result

from blipq import Client, InvalidRequest, QueueFull, QueueUnavailable, Settings
from blipq.bulk.driver import Driver, job_id_of
from blipq.bulk.journal import Journal, driving, is_driven
from blipq.bulk.manifest import Entry, Prefix
from blipq.bulk.manners import Manners
from blipq.bulk.start import begin, journal_path, template_from
from blipq.cli import app
from blipq.cli.terminal.bar import Bar
from blipq.cli.terminal.output import Terminal
from blipq.ledger.producer import ProducerLedger
from blipq.ledger.views.runs import MOST, Runs
from blipq.ledger.views.runs import Run as Noted
from blipq.ledger.worker import Claim, WorkerLedger
from blipq.s3.storage import Storage
from conftest import ROOT, ledger_of

IMAGE = "s3://photos/cat.jpg"


def line(custom_id: str, **fields: Any) -> str:
    return json.dumps({"custom_id": custom_id, "kind": "caption", "image": IMAGE} | fields)


def open_files() -> set[Path]:
    """The files that this process has open."""
    names = (Path("/proc/self/fd") / name for name in os.listdir("/proc/self/fd"))
    return {name.readlink() for name in names if name.is_symlink()}


class Bulk:
    """A manifest in a folder and its journal."""

    def __init__(self, client: Client, folder: Path) -> None:
        self.client = client
        self.manifest = folder / "manifest.jsonl"
        self.path = folder / "manifest.jsonl.bulk"
        self.journal: Journal | None = None

    def write(self, *lines: str) -> None:
        self.manifest.write_text("".join(f"{each}\n" for each in lines))

    def driver(self, *, window: int = 100, **options: Any) -> Driver:
        self.close()
        facts = {"manifest": str(self.manifest), "template": None, "defaults": {}}
        self.journal, self.source = begin(self.path, facts, self.client.storage)
        return Driver(self.client, self.journal, self.source.entries, window=window, **options)

    def close(self) -> None:
        if self.journal is not None:
            self.journal.close()

    def outcomes(self) -> list[dict[str, Any]]:
        with closing(Journal.open(self.path)) as journal:
            return list(journal.outcomes())


@pytest.fixture
def bulk(client: Client, tmp_path: Path) -> Iterator[Bulk]:
    bulk = Bulk(client, tmp_path)
    yield bulk
    bulk.close()


@contextmanager
def worker(ledger: WorkerLedger, *, after: threading.Event | None = None) -> Iterator[None]:
    """Ends whatever is queued: the caption is the prompt; ``fail`` fails."""
    stop = threading.Event()

    def work() -> None:
        if after is not None:
            after.wait(30)
        while not stop.wait(0.01):
            for queue in ledger.redis.zrange("blipq:queues", 0, -1):  # type: ignore[union-attr]
                for id in ledger.redis.zrange(f"blipq:queued:{queue}", 0, -1):  # type: ignore[union-attr]
                    claim = ledger.claim(id, "w1")
                    if isinstance(claim, Claim):
                        end(claim)

    def end(claim: Claim) -> None:
        prompt = json.loads(claim.request).get("prompt", "")
        if prompt == "fail":
            error = {"code": "image_not_found", "message": "no such key"}
            ledger.fail(claim, json.dumps(error), "{}")
        else:
            result = {"kind": "caption", "captions": [{"text": prompt}]}
            ledger.succeed(claim, json.dumps(result), "{}")

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def test_every_line_has_one_outcome_in_the_order_of_the_manifest(
    bulk: Bulk, ledger: WorkerLedger
) -> None:
    bulk.write(
        line("a", prompt="one"),
        "nonsense",
        line("b", prompt="fail"),
        line("a", prompt="two"),
        line("c", options={"webhook": {"url": "http://10.0.0.1/"}}),
        line("d"),
    )
    with worker(ledger):
        bulk.driver().run()
    told = [(each["line"], each["custom_id"], each["status"]) for each in bulk.outcomes()]
    assert told == [
        (1, "a", "succeeded"),
        (2, None, "refused"),
        (3, "b", "failed"),
        (4, "a", "refused"),
        (5, "c", "refused"),
        (6, "d", "succeeded"),
    ]
    first, _, failed, twice, webhook, _ = bulk.outcomes()
    assert first["result"]["captions"] == [{"text": "one"}]
    assert failed["error"]["code"] == "image_not_found"
    assert twice["error"]["message"] == "custom_id: line 1 has it, too"
    assert "webhook.url" in webhook["error"]["message"]


def test_an_outcome_names_the_object_of_a_result_that_is_not_in_redis(
    bulk: Bulk, ledger: WorkerLedger, client: Client
) -> None:
    bulk.write(line("a", options={"output": "s3://blipq-outputs/a.json"}))
    bulk.client = Client(client.settings.model_copy(update={"keep_delivered": False}))
    with worker(ledger), bulk.client:
        bulk.driver().run()
    (outcome,) = bulk.outcomes()
    assert (outcome["status"], outcome["result_uri"]) == ("succeeded", "s3://blipq-outputs/a.json")


def test_never_more_than_the_window_is_in_flight_and_nothing_stays_in_redis(
    bulk: Bulk, ledger: WorkerLedger
) -> None:
    bulk.write(*(line(str(n)) for n in range(60)))
    most = 0

    def tell(driver: Driver) -> None:
        nonlocal most
        most = max(most, int(ledger.redis.zcard("blipq:open")), driver.in_flight)  # type: ignore[arg-type]

    with worker(ledger):
        bulk.driver(window=7, report=tell).run()
    assert 0 < most <= 7
    assert len(bulk.outcomes()) == 60
    assert list(ledger.redis.scan_iter("blipq:job:*")) == []


class Killed(BaseException):
    """Stands in for kill -9: nothing below it catches it."""


@pytest.mark.parametrize("step", range(12))
def test_a_bulk_that_is_killed_anywhere_goes_on(
    bulk: Bulk, ledger: WorkerLedger, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """Before and after each change of the journal and of the ledger."""
    bulk.write(*(line(str(n), prompt=str(n)) for n in range(9)), line("3"))
    places = (
        (Journal, "add"),
        (ProducerLedger, "submit_all"),
        (Journal, "end"),
        (ProducerLedger, "release"),
    )
    owner, name = places[step % 4]
    real = getattr(owner, name)
    calls = iter(range(10))

    def deadly(*args: Any, **options: Any) -> Any:
        if next(calls) != step // 4 % 2:
            return real(*args, **options)
        if step < 8:
            raise Killed
        real(*args, **options)
        raise Killed

    monkeypatch.setattr(owner, name, deadly)
    with worker(ledger):
        with pytest.raises(Killed):
            bulk.driver(window=4).run()
        monkeypatch.setattr(owner, name, real)
        bulk.driver(window=4).run()
    told = [(each["custom_id"], each["status"]) for each in bulk.outcomes()]
    assert told == [*((str(n), "succeeded") for n in range(9)), ("3", "refused")]
    assert list(ledger.redis.scan_iter("blipq:job:*")) == []


def test_jobs_that_redis_lost_are_submitted_again(bulk: Bulk, ledger: WorkerLedger) -> None:
    bulk.write(*(line(str(n)) for n in range(5)))
    lost = threading.Event()

    def tell(driver: Driver) -> None:
        if driver.in_flight == 5 and not lost.is_set():
            ledger.redis.flushdb()
            lost.set()

    with worker(ledger, after=lost):
        bulk.driver(report=tell).run()
    assert [each["status"] for each in bulk.outcomes()] == ["succeeded"] * 5


@pytest.mark.parametrize("error", [QueueFull, QueueUnavailable])
def test_a_full_queue_or_an_outage_slows_a_bulk_down(
    bulk: Bulk, ledger: WorkerLedger, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    bulk.write(*(line(str(n)) for n in range(5)))
    troubles = []

    def tell(driver: Driver) -> None:
        troubles.append(driver.trouble)

    real, failures = ProducerLedger.submit_all, iter([1, 1])

    def flaky(self: ProducerLedger, jobs: Any) -> Any:
        if next(failures, None):
            raise error("not now")
        return real(self, jobs)

    monkeypatch.setattr(ProducerLedger, "submit_all", flaky)
    with worker(ledger):
        bulk.driver(report=tell).run()
    assert [each["status"] for each in bulk.outcomes()] == ["succeeded"] * 5
    assert any(isinstance(trouble, error) for trouble in troubles)
    assert troubles[-1] is None


def test_an_id_belongs_to_a_line_of_a_bulk(bulk: Bulk) -> None:
    bulk.write(line("a"), line("b"))
    bulk.driver()
    one, two = bulk.source.entries(0, "")
    ids = {job_id_of("x", one), job_id_of("x", two), job_id_of("y", one), job_id_of("x", one)}
    assert len(ids) == 3
    assert all(len(id) == 40 and id[18] == "8" for id in ids)


def test_the_id_of_a_line_is_the_same_in_every_version() -> None:
    """A bulk that goes on after an upgrade finds the jobs that were recorded before it."""
    entry = Entry(number=7, position="", custom_id="a", work=None)
    assert job_id_of("bulk_1", entry) == "job_b17e6dca-8bfb-85e3-bc5a-bb6d879aa11e"


def test_a_bulk_is_not_confused_with_another(bulk: Bulk) -> None:
    bulk.write(line("a"))
    bulk.driver()
    bulk.write(line("a"), line("b"))
    with pytest.raises(InvalidRequest, match="another manifest, or it has changed"):
        bulk.driver()
    bulk.close()
    assert bulk.path not in open_files()


@pytest.mark.parametrize(("begun", "now"), [(None, "shop"), ("shop", "zoo"), ("shop", None)])
def test_a_bulk_is_not_resumed_for_another_tenant(
    bulk: Bulk, ledger: WorkerLedger, begun: str | None, now: str | None
) -> None:
    bulk.write(line("a"), line("b"))
    settings = bulk.client.settings
    with Client(settings.model_copy(update={"tenant": begun})) as bulk.client:
        bulk.driver()
    with Client(settings.model_copy(update={"tenant": now})) as bulk.client:
        refusal = f"begun for {begun or 'no tenant'}, and BLIPQ_TENANT is of {now or 'no tenant'}"
        with pytest.raises(InvalidRequest, match=refusal):
            bulk.driver()
    with Client(settings.model_copy(update={"tenant": begun})) as bulk.client, worker(ledger):
        bulk.driver().run()
    assert [each["status"] for each in bulk.outcomes()] == ["succeeded"] * 2


def test_a_file_that_is_no_journal_is_left_alone(bulk: Bulk) -> None:
    bulk.write(line("a"))
    bulk.path.write_text("my diary, which is long enough to be a header of something else")
    with pytest.raises(InvalidRequest, match="is not a bulk's journal"):
        bulk.driver()
    assert bulk.path.read_text().startswith("my diary")
    assert bulk.path not in open_files()


def test_two_processes_do_not_work_on_one_bulk(bulk: Bulk) -> None:
    bulk.write(line("a"))
    with driving(bulk.path):
        assert is_driven(bulk.path)
        with pytest.raises(InvalidRequest, match="another process"), driving(bulk.path):
            pass
    assert not is_driven(bulk.path)


def test_a_journal_that_was_worked_on_has_no_other_file_beside_it(bulk: Bulk) -> None:
    bulk.write(line("a"))
    before = set(bulk.path.parent.iterdir())
    assert not is_driven(bulk.path)
    with pytest.raises(KeyError), driving(bulk.path):
        raise KeyError
    assert set(bulk.path.parent.iterdir()) == before


def test_a_lock_that_its_holder_removes_meanwhile_is_made_anew(
    bulk: Bulk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The holder ended between opening the file and locking it: nobody else would see that lock."""
    lock, flock = Path(f"{bulk.path}-lock"), fcntl.flock
    removed: list[Path] = []

    def after_the_holder_ended(file: IO[bytes], how: int) -> None:
        if not removed:
            removed.append(lock)
            lock.unlink()
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", after_the_holder_ended)
    with driving(bulk.path):
        assert removed
        assert is_driven(bulk.path)


def test_a_lock_that_a_killed_process_left_holds_up_nobody(bulk: Bulk) -> None:
    lock = Path(f"{bulk.path}-lock")
    lock.touch()
    assert not is_driven(bulk.path)
    with driving(bulk.path):
        assert is_driven(bulk.path)
    assert not lock.exists()


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("m.jsonl", "m.jsonl.bulk"),
        ("/data/m.jsonl", "m.jsonl.bulk"),
        ("s3://b/x/m.jsonl", "m.jsonl.bulk"),
        ("s3://photos/2026/", "2026.bulk"),
        ("/data/m.jsonl.bulk", "/data/m.jsonl.bulk"),
    ],
)
def test_a_journal_is_named_after_its_manifest(name: str, path: str) -> None:
    assert journal_path(name) == Path(path)


# --- the command ----------------------------------------------------------------------------------

Run = Callable[..., Result]


@pytest.fixture
def run(apart: Settings, bulk: Bulk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """`blipq bulk` in this process and the bulk's folder."""
    for name in ("redis_url", "s3_endpoint_url", "s3_access_key_id"):
        monkeypatch.setenv(f"BLIPQ_{name.upper()}", str(getattr(apart, name)))
    assert apart.s3_secret_access_key is not None
    secret = apart.s3_secret_access_key.get_secret_value()
    monkeypatch.setenv("BLIPQ_S3_SECRET_ACCESS_KEY", secret)
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: CliRunner().invoke(app, ["bulk", *arguments])


@pytest.mark.parametrize("written", [None, "custom_id,kind,image\n1,caption,s3://b/a.png\n"])
def test_a_refused_manifest_leaves_nothing_behind(
    run: Run, tmp_path: Path, written: str | None
) -> None:
    """It once left an empty ``.bulk-lock`` beside what was mistyped."""
    if written is not None:
        (tmp_path / "table").write_text(written)
    before = sorted(tmp_path.iterdir())
    refused = run("submit", "table" if written else "nosuch.jsonl")
    assert refused.exit_code == 2, refused.output
    assert sorted(tmp_path.iterdir()) == before


def test_a_journal_in_no_folder_is_refused_with_what_to_do(run: Run, bulk: Bulk) -> None:
    bulk.write(line("a"))
    refused = run("submit", "manifest.jsonl", "--journal", "nowhere/m.bulk")
    assert refused.exit_code == 2, refused.output
    message = " ".join(refused.stderr.split())
    assert "no journal can be written at nowhere/m.bulk: No such file or directory" in message
    assert "give another --journal" in message


def test_a_bulk_is_submitted_looked_at_and_written_out(
    run: Run, bulk: Bulk, ledger: WorkerLedger, tmp_path: Path
) -> None:
    bulk.write(*(line(str(n), prompt=f"ü{n}") for n in range(3)))
    with worker(ledger):
        ran = run("submit", "manifest.jsonl", "--json")
    assert ran.exit_code == 0, ran.output
    summary = json.loads(ran.stdout)
    assert (summary["state"], summary["counts"]) == ("done", {"succeeded": 3})
    assert json.loads(run("status", "manifest.jsonl", "--json").stdout) == summary
    assert "done, 3 succeeded" in run("status", "manifest.jsonl.bulk").stdout
    assert run("results", "manifest.jsonl", "--output", "results.jsonl").exit_code == 0
    lines = (tmp_path / "results.jsonl").read_text().splitlines()
    assert [json.loads(each)["result"]["captions"][0]["text"] for each in lines] == [
        "ü0",
        "ü1",
        "ü2",
    ]


def test_a_finished_bulk_submitted_again_runs_nothing(
    run: Run, bulk: Bulk, ledger: WorkerLedger
) -> None:
    bulk.write(line("a"))
    with worker(ledger):
        run("submit", "manifest.jsonl")
    ran = run("submit", "manifest.jsonl", "--json")  # no worker: it would hang
    assert json.loads(ran.stdout)["counts"] == {"succeeded": 1}


def test_a_line_that_failed_exits_3(run: Run, bulk: Bulk, ledger: WorkerLedger) -> None:
    bulk.write(line("a"), "nonsense")
    with worker(ledger):
        assert run("submit", "manifest.jsonl").exit_code == 3


def test_why_lines_are_refused_is_told_on_the_terminal(
    run: Run, bulk: Bulk, ledger: WorkerLedger, tmp_path: Path
) -> None:
    """The first of them, so that a manifest that is wrong throughout fills no screen."""
    wrong = line("w", generation={"num_beam": 3})
    bulk.write(line("a"), wrong, *(["nonsense " + 9_000 * "x"] * 20))
    with worker(ledger):
        ran = run("submit", "manifest.jsonl")
    assert ran.exit_code == 3
    assert ran.stderr.count("is refused: ") == 5
    why = "line 2 is refused: caption.generation.num_beam: unknown; did you mean num_beams?"
    assert why in ran.stderr
    assert "line 3 is refused: " in ran.stderr
    assert "21 lines were refused; the results have the reason of each" in ran.stderr
    assert len(ran.stderr) < 4_000
    (tmp_path / "few.jsonl").write_text("nonsense\n")
    few = run("submit", "few.jsonl")
    assert few.stderr.count("is refused: ") == 1
    assert "lines were refused" not in few.stderr
    assert "refused: " not in run("submit", "few.jsonl", "--json").stdout
    spaced = run("submit", "few.jsonl", "--journal", "my few.bulk")
    assert "bulk results 'my few.bulk' --output FILE" in spaced.stderr


def test_results_go_to_s3(run: Run, bulk: Bulk, ledger: WorkerLedger, client: Client) -> None:
    bulk.write(line("a"))
    client.storage.create_bucket("manifests")
    with worker(ledger):
        run("submit", "manifest.jsonl")
    ran = run("results", "manifest.jsonl", "--output", "s3://manifests/out.jsonl", "--json")
    assert json.loads(ran.stdout)["lines"] == 1
    body = client.storage.client.get_object(Bucket="manifests", Key="out.jsonl")["Body"].read()
    assert json.loads(body)["custom_id"] == "a"
    refused = run("results", "manifest.jsonl", "--output", "s3://x")
    assert refused.exit_code == 2


def test_objects_under_a_prefix_are_submitted_by_a_template(
    run: Run, ledger: WorkerLedger, client: Client, tmp_path: Path
) -> None:
    client.storage.create_bucket("manifests")
    for key in ("in/a.jpg", "in/b.jpg"):
        client.storage.put(f"s3://manifests/{key}", b"x", content_type="image/jpeg")
    (tmp_path / "caption.json").write_text('{"kind": "caption"}')
    with worker(ledger):
        uri = "s3://manifests/in/"
        ran = run("submit", "--prefix", uri, "--template", "caption.json", "--json")
    assert json.loads(ran.stdout)["counts"] == {"succeeded": 2}
    with closing(Journal.open(tmp_path / "in.bulk")) as journal:
        told = [each["custom_id"] for each in journal.outcomes()]
    assert told == ["in/a.jpg", "in/b.jpg"]


def test_the_example_is_the_one_in_the_docs_and_runs(
    run: Run, ledger: WorkerLedger, tmp_path: Path
) -> None:
    folder = ROOT / "examples" / "bulk"
    text = (folder / "manifest.jsonl").read_text()
    assert f"```json\n{text}```" in (ROOT / "docs" / "bulk.md").read_text()
    with worker(ledger):
        ran = run("submit", str(folder / "manifest.jsonl"), "--json")
    assert json.loads(ran.stdout)["counts"] == {"succeeded": 3}
    template = template_from(folder / "caption.json")
    assert Prefix("s3://photos/", template, {}, Storage(Settings())).name == "s3://photos/"


@pytest.mark.parametrize(
    "arguments",
    [
        ("submit",),
        ("submit", "none.jsonl"),
        ("submit", "manifest.jsonl", "--prefix", "s3://b/p", "--template", "t.json"),
        ("submit", "--prefix", "s3://photos/p"),
        ("submit", "manifest.jsonl", "--model", "/"),
        ("status", "none.jsonl"),
        ("cancel", "none.jsonl"),
        ("results", "none.jsonl", "--output", "x"),
    ],
)
def test_wrong_usage_exits_2(run: Run, bulk: Bulk, arguments: tuple[str, ...]) -> None:
    bulk.write(line("a"))
    assert run(*arguments).exit_code == 2


def test_other_options_do_not_go_on_with_a_bulk(run: Run, bulk: Bulk, ledger: WorkerLedger) -> None:
    bulk.write(line("a"))
    with worker(ledger):
        run("submit", "manifest.jsonl")
    ran = run("submit", "manifest.jsonl", "--priority", "high")
    assert ran.exit_code == 2
    assert "begun with other options: defaults" in ran.stderr


def test_a_cancelled_bulk_keeps_what_has_ended(run: Run, bulk: Bulk, ledger: WorkerLedger) -> None:
    bulk.write(*(line(str(n)) for n in range(50)))
    driver = bulk.driver(window=5)
    with worker(ledger):
        driver._fill()
        while not driver._collect():
            time.sleep(0.01)
    driver._fill()
    ended = sum(driver.counts.values())
    bulk.close()
    ran = run("cancel", "manifest.jsonl", "--json")
    summary = json.loads(ran.stdout)
    assert summary["state"] == "cancelled"
    assert summary["counts"]["succeeded"] >= ended > 0
    assert summary["counts"]["cancelled"] > 0
    assert "open" not in summary["counts"]
    assert ledger.redis.zcard("blipq:open") == 0
    assert run("submit", "manifest.jsonl").exit_code == 2


def test_a_cancel_ends_what_redis_has_lost(run: Run, bulk: Bulk, ledger: WorkerLedger) -> None:
    bulk.write(line("a"), line("b"))
    bulk.driver()._fill()
    bulk.close()
    ledger.redis.flushdb()
    summary = json.loads(run("cancel", "manifest.jsonl", "--json").stdout)
    assert summary["counts"] == {"cancelled": 2}


def test_an_output_that_no_worker_may_write_is_told_before_a_line_is_submitted(
    run: Run, bulk: Bulk, ledger: WorkerLedger, client: Client
) -> None:
    def serve(*outputs: str) -> None:
        info = json.dumps({"models": ["default"], "outputs": outputs})
        ledger_of(client).register("w1", ["default"], info, ttl_s=60, spare=False)

    answer = {"options": {"output": "s3://answers/1.json"}}
    bulk.write(line("1"), line("2", **answer), line("3", **answer))
    serve("elsewhere")
    ran = run("submit", "manifest.jsonl")
    assert ran.exit_code == 2
    assert "line 2: output: the workers of 'default' refuse it" in ran.stderr
    assert client.ledger.redis.zcard("blipq:open") == 0
    serve("elsewhere", "answers")
    with worker(ledger):
        assert run("submit", "manifest.jsonl").exit_code == 0


def test_one_output_that_is_refused_stops_no_other_line(
    run: Run, bulk: Bulk, ledger: WorkerLedger, client: Client
) -> None:
    info = json.dumps({"models": ["default"], "outputs": ["answers"]})
    ledger_of(client).register("w1", ["default"], info, ttl_s=60, spare=False)
    places = ("s3://other/1.json", "s3://answers/2.json")
    lines = [line(uri, options={"output": uri}) for uri in places]
    bulk.write(*lines)
    with worker(ledger):
        assert run("submit", "manifest.jsonl").exit_code == 0


def test_results_of_a_bulk_that_is_not_done_exit_5(run: Run, bulk: Bulk) -> None:
    bulk.write(line("a"), "nonsense")
    bulk.driver()._fill()
    bulk.close()
    ran = run("results", "manifest.jsonl", "--output", "results.jsonl")
    assert ran.exit_code == 5
    assert "results.jsonl: 1 lines" in ran.stdout


def test_a_paused_bulk_submits_nothing_until_it_goes_on(
    run: Run, bulk: Bulk, ledger: WorkerLedger
) -> None:
    bulk.write(*(line(f"line-{number}") for number in range(30)))
    driver = bulk.driver(window=5)
    assert bulk.journal is not None
    bulk.journal.note(paused=True)
    seen: list[tuple[int, bool]] = []

    def report(driver: Driver) -> None:
        seen.append((driver.lines, driver.paused))
        if len(seen) == 3:
            assert run("resume", "manifest.jsonl").exit_code == 0

    driver._report = report
    with worker(ledger):
        driver.run()
    assert seen[:3] == [(0, True)] * 3
    assert {each["status"] for each in bulk.outcomes()} == {"succeeded"}
    assert run("pause", "manifest.jsonl").exit_code == 0
    with closing(Journal.open(bulk.path)) as journal:
        assert journal.fact("paused") is True


def test_a_bulk_whose_time_is_over_collects_what_is_in_flight_and_goes_on_later(
    bulk: Bulk, ledger: WorkerLedger
) -> None:
    bulk.write(*(line(f"line-{number}") for number in range(30)))
    over = False

    class Until(Manners):
        @property
        def is_over(self) -> bool:
            return over

    def report(driver: Driver) -> None:
        nonlocal over
        over = driver.lines >= 10

    with worker(ledger):
        bulk.driver(window=5, manners=Until(), report=report).run()
        ended = bulk.outcomes()
        assert 10 <= len(ended) < 30
        with closing(Journal.open(bulk.path)) as journal:
            assert journal.open_lines() == []
            assert not journal.fact("exhausted")
        bulk.driver(window=5).run()
    assert len(bulk.outcomes()) == 30


def test_a_bulk_that_stops_at_its_time_exits_5(run: Run, bulk: Bulk) -> None:
    bulk.write(line("a"))
    at = datetime.now() + timedelta(seconds=1)
    ran = run("submit", "manifest.jsonl", "--until", "25:00")
    assert (ran.exit_code, "06:00" in ran.output) == (2, True)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("blipq.cli.bulk.next_time", lambda text: at.astimezone(UTC))
        patched.setattr("blipq.bulk.driver.Pace.room", lambda pace, most: 0)
        ran = run("submit", "manifest.jsonl", "--until", f"{at:%H:%M}", "--json")
    assert (ran.exit_code, json.loads(ran.stdout)["state"]) == (5, "stopped")


def test_lines_that_wait_for_a_web_host_are_cancelled_with_the_others(
    bulk: Bulk, ledger: WorkerLedger
) -> None:
    bulk.write(*(line(f"{n}", image=f"https://slow.example/{n}.jpg") for n in range(10)))
    manners = Manners(host_rate=0.001)
    driver = bulk.driver(manners=manners)

    def report(driver: Driver) -> None:
        if driver.waiting and bulk.journal is not None:
            bulk.journal.note(cancelled=True)

    driver._report = report
    driver.run()
    assert Counter(each["status"] for each in bulk.outcomes()) == {"cancelled": 10}


def test_jobs_with_web_pictures_are_collected_by_a_driver_that_begins_in_a_pause(
    bulk: Bulk, ledger: WorkerLedger
) -> None:
    bulk.write(*(line(f"{n}", image=f"https://slow.example/{n}.jpg") for n in range(3)))
    bulk.driver(manners=Manners(host_rate=None))._fill()
    driver, deadline = bulk.driver(manners=Manners(host_rate=0.001)), time.monotonic() + 60
    assert bulk.journal is not None
    bulk.journal.note(paused=True)
    seen: list[tuple[bool, int, int]] = []

    def report(driver: Driver) -> None:
        seen.append((driver.paused, driver.waiting, driver.counts.get("succeeded", 0)))
        if seen[-1][2] == 3 or time.monotonic() > deadline:
            assert bulk.journal is not None
            bulk.journal.note(paused=False)

    driver._report = report
    with worker(ledger):
        driver.run()
    assert (True, 0, 3) in seen
    assert {waiting for _, waiting, _ in seen} == {0}


def test_jobs_that_redis_lost_wait_for_the_end_of_a_pause(
    bulk: Bulk, ledger: WorkerLedger, monkeypatch: pytest.MonkeyPatch
) -> None:
    bulk.write(*(line(f"{n}") for n in range(3)))
    bulk.driver()._fill()
    ledger.redis.flushdb()
    driver = bulk.driver()
    assert bulk.journal is not None
    bulk.journal.note(paused=True, exhausted=True)
    driver.exhausted = True
    recorded: list[Any] = []
    pauses: list[float] = []
    sleep = time.sleep

    def pause(seconds: float) -> None:
        pauses.append(seconds)
        sleep(seconds)

    def report(driver: Driver) -> None:
        recorded.append(ledger.redis.zcard("blipq:open"))
        if len(recorded) == 6:
            assert len(pauses) == 5
            assert bulk.journal is not None
            bulk.journal.note(paused=False)

    monkeypatch.setattr("blipq.bulk.driver.time.sleep", pause)
    driver._report = report
    with worker(ledger):
        driver.run()
    assert recorded[:6] == [0] * 6
    assert [each["status"] for each in bulk.outcomes()] == ["succeeded"] * 3


def test_jobs_that_redis_lost_are_left_to_the_next_driver_when_the_time_is_over(
    bulk: Bulk, ledger: WorkerLedger
) -> None:
    bulk.write(*(line(f"{n}") for n in range(3)))
    bulk.driver()._fill()
    ledger.redis.flushdb()
    bulk.driver(manners=Manners(until=datetime.now(UTC))).run()
    assert ledger.redis.zcard("blipq:open") == 0
    with closing(Journal.open(bulk.path)) as journal:
        assert len(journal.open_lines()) == 3
    with worker(ledger):
        bulk.driver().run()
    assert [each["status"] for each in bulk.outcomes()] == ["succeeded"] * 3


def test_a_terminal_of_80_columns_shows_the_newest_answers_below_the_bar(
    bulk: Bulk, ledger: WorkerLedger, monkeypatch: pytest.MonkeyPatch
) -> None:
    screen = io.StringIO()
    terminal = Terminal(file=screen, force_terminal=True, width=80, highlight=False)
    monkeypatch.setattr("blipq.cli.terminal.bar.errors", terminal)
    bulk.write(*(line(f"{n}", prompt=f"answer {n} " + "x" * 200) for n in range(50)))
    with worker(ledger), Bar(lambda driver: 0.5, shown=True) as bar:
        bulk.driver(window=5, report=bar.show).run()
        bar._progress.refresh()
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue()).replace("\r", "\n").split("\n")
    assert max(map(len, lines)) <= 80
    assert any("cat.jpg: answer" in each for each in lines)
    assert any("50 ended" in each for each in lines)


def test_a_bulk_notes_how_far_it_is_for_the_console(
    run: Run, bulk: Bulk, ledger: WorkerLedger
) -> None:
    bulk.write(line("a"), line("b"), "nonsense")
    with worker(ledger):
        assert run("submit", "manifest.jsonl", "--json").exit_code == 3
    (noted,) = Runs.beside(ledger).newest()
    assert (noted.name, noted.state, noted.shown) == ("manifest.jsonl", "done", "done")
    assert (noted.counts, noted.share) == ({"succeeded": 2, "refused": 1}, 1.0)
    for key in ("blipq:runs", f"blipq:run:{noted.id}"):
        assert 6 * 86400 < int(ledger.redis.ttl(key)) <= 7 * 86400  # type: ignore[arg-type]
    assert replace(noted, state="running", at=time.time() - 3600).shown == "stopped"


def test_a_run_that_a_later_version_noted_is_listed(ledger: WorkerLedger) -> None:
    runs, noted = Runs.beside(ledger), Noted("bulk_1", "m.jsonl", "running", None, at=1.0)
    runs.note(noted)
    text = json.loads(str(ledger.redis.get("blipq:run:bulk_1")))
    ledger.redis.set("blipq:run:bulk_1", json.dumps(text | {"later": 1}), ex=60)
    assert runs.newest() == [noted]


def test_no_more_runs_are_noted_than_are_shown(ledger: WorkerLedger) -> None:
    runs = Runs.beside(ledger)
    for number in range(MOST + 5):
        runs.note(Noted(f"bulk_{number}", "m.jsonl", "running", None, at=float(number)))
    assert [each.id for each in runs.newest()][:2] == [f"bulk_{MOST + 4}", f"bulk_{MOST + 3}"]
    assert len(runs.newest()) == MOST
