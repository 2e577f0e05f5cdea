"""``make soak MINUTES=60``: a day's work in an hour, with its troubles, and an audit.

Two workers with fronts serve the demo model. Services submit jobs of all kinds through the Python
client and through the door, a third of them with a webhook; somebody reads the console; a bulk
runs in the background. Meanwhile the processes of one worker, the sender of webhooks and Redis are
killed or restarted in turn. At the end every job must have succeeded and every event must have been
delivered, no key may live for ever, and no process that lived through it may have grown (see
``growth``). Exit code 0 only if all hold.
"""

import argparse
import io
import itertools
import json
import random
import re
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any

import httpx2

sys.path.insert(0, str(Path(__file__).parents[2]))

from blipq import Client, Job, QueueFull, QueueUnavailable, ResultTimeout, Settings
from blipq.contract import ImageRef, Webhook
from blipq.local import supervisor
from blipq.local.supervisor import Service
from blipq.submission import new_id
from blipq_worker.demo.world.drawing import render
from blipq_worker.demo.world.scenes import Scene, scene
from conftest import wait_until
from guarantees.fronts import parts
from guarantees.rig import Rig
from guarantees.soak.growth import Growth, Watch
from receivers import SECRET, Got, Receiver

PICTURES, FRONTS = 120, 2
#: Results live briefly, so that Redis' memory can be judged, too.
RESULT_TTL_S = 240
#: Of each caller: from the end of a job to the next one.
PAUSE_S = 0.4
SAMPLE_EVERY_S, TROUBLE_EVERY_S, PAGES_EVERY_S, BULK_EVERY_S = 15.0, 45.0, 3.0, 20.0
PAGES = (
    "",
    "jobs",
    "jobs?status=succeeded",
    "queues",
    "workers",
    "dead",
    "webhooks",
    "log",
)
JOB_TIMEOUT_S, SETTLE_S = 180.0, 120.0
BULK_LINES = 40
KINDS = ("caption", "vqa", "match", "embed", "describe", "search")
#: What a day has at least one of.
EXPECTED = ("HTTP succeeded", "bulk lines", "page 200", *(f"{kind} succeeded" for kind in KINDS))
#: How what ended is counted where all is right; pages may find Redis away.
RIGHT = ("succeeded", "200", "503", "lines")


class Callers:
    """Services that ask for jobs, and what came of them."""

    def __init__(self, rig: Rig, hook: str, stop: threading.Event) -> None:
        self.ended: Counter[str] = Counter()
        self.wrong: Counter[str] = Counter()
        self.repeated: Counter[str] = Counter()
        self.events_expected: set[str] = set()
        self._rig, self._hook, self._stop = rig, hook, stop
        self._scenes = [scene(seed) for seed in range(PICTURES)]
        fields = rig.settings.model_dump() | {"webhook_allow": "127.0.0.1"}
        self._client = Client(Settings.model_validate(fields))
        self._uris = [self._client.storage.upload(_png(each)) for each in self._scenes]
        for uri, each in zip(self._uris, self._scenes, strict=True):
            self._client.embed(uri, index={"name": "day", "id": str(each.seed)}).result(60)

    def noting(self, work: Callable[[], None]) -> Callable[[], None]:
        """The same work, of which an error is noted as wrong: a thread's own end is silent."""

        def done() -> None:
            try:
                work()
            except BaseException as error:
                name = getattr(getattr(work, "func", work), "__name__", "work")
                self.wrong[f"{name}: {type(error).__name__}: {error}"[:160]] += 1

        return done

    # -- by Python --

    def ask(self, seed: int) -> None:
        """Asks for one job of each kind after the other until the end."""
        rng = random.Random(seed)
        for number in itertools.count():
            if self._stop.wait(PAUSE_S):
                return
            self._one(rng, with_event=number % 3 == 0)

    def _one(self, rng: random.Random, *, with_event: bool) -> None:
        shown, uri = rng.choice(list(zip(self._scenes, self._uris, strict=True)))
        kind, submit = rng.choice(list(self._kinds(shown, uri).items()))
        options: dict[str, Any] = {"idempotency_key": new_id()}
        if with_event:
            options["webhook"] = Webhook(url=self._hook)
        try:
            job = self._submitted(partial(submit, **options))
            if with_event:
                self.events_expected.add(job.id)
            self.ended[f"{kind} {self._status_of(job)}"] += 1
        except Exception as error:
            self.wrong[f"{kind}: {type(error).__name__}: {error}"[:160]] += 1

    def _kinds(self, shown: Scene, uri: ImageRef) -> Mapping[str, Callable[..., Job[Any]]]:
        client = self._client
        question = shown.questions()[0].question
        return {
            "caption": partial(client.caption, uri),
            "vqa": partial(client.vqa, uri, [question, "how many shapes are there?"]),
            "match": partial(client.match, uri, shown.matching_texts()),
            "embed": partial(client.embed, uri),
            "describe": partial(client.describe, uri, questions=question, embed=True),
            "search": partial(client.search, "day", shown.caption, rerank=8),
        }

    def _submitted(self, submit: Callable[[], Job[Any]]) -> Job[Any]:
        while True:  # with the same key: it is one job
            try:
                return submit()
            except (QueueUnavailable, QueueFull) as error:
                self.repeated[type(error).__name__] += 1
                time.sleep(0.3)

    def _status_of(self, job: Job[Any]) -> str:
        deadline = time.monotonic() + JOB_TIMEOUT_S
        while True:
            try:
                return job.wait(max(0.1, deadline - time.monotonic())).status
            except QueueUnavailable:
                time.sleep(0.3)
            except ResultTimeout:
                return "not ended in time"

    # -- by HTTP --

    def ask_by_http(self, door: str, seed: int) -> None:
        """The same through the door: a submit, then waits."""
        rng = random.Random(seed)
        with httpx2.Client(base_url=door, timeout=60, trust_env=False) as http:
            while not self._stop.wait(PAUSE_S):
                body = {"kind": "caption", "image": rng.choice(self._uris).uri}
                headers = {"Idempotency-Key": new_id()}
                try:
                    job = self._answer(http, "POST", "/v1/jobs", json=body, headers=headers)
                    self.ended[f"HTTP {self._http_status(http, job['id'])}"] += 1
                except Exception as error:
                    self.wrong[f"HTTP: {type(error).__name__}: {error}"[:160]] += 1

    def _http_status(self, http: httpx2.Client, id: str) -> str:
        deadline = time.monotonic() + JOB_TIMEOUT_S
        while time.monotonic() < deadline:
            job = self._answer(http, "GET", f"/v1/jobs/{id}", params={"wait": 20})
            if job["status"] not in ("queued", "running"):
                return str(job["status"])
        return "not ended in time"

    def _answer(self, http: httpx2.Client, method: str, path: str, **given: Any) -> Any:
        deadline = time.monotonic() + JOB_TIMEOUT_S
        while True:
            answer = http.request(method, path, **given)
            if answer.status_code != 503 or time.monotonic() > deadline:
                break
            self.repeated["503"] += 1
            time.sleep(0.3)
        if answer.is_error:
            raise RuntimeError(f"{answer.status_code} {answer.text[:100]}")
        return answer.json()

    def read_pages(self, door: str) -> None:
        """Somebody who looks at the console."""
        with httpx2.Client(base_url=door, timeout=60, trust_env=False) as http:
            for page in itertools.cycle(PAGES):
                if self._stop.wait(PAGES_EVERY_S):
                    return
                answer = http.get(f"/console/{page}", follow_redirects=True)
                known = answer.status_code in (200, 503)
                (self.ended if known else self.wrong)[f"page {answer.status_code}"] += 1

    # -- a bulk --

    def run_bulks(self) -> None:
        """A manifest after the other, and its results."""
        for number in itertools.count():
            if self._stop.wait(BULK_EVERY_S):
                return
            manifest = self._rig.folder / f"bulk-{number}.jsonl"
            lines = [
                {"custom_id": str(line), "kind": "caption", "image": self._uris[line].uri}
                for line in range(BULK_LINES)
            ]
            manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))
            journal, output = manifest.with_suffix(".bulk"), manifest.with_suffix(".out")
            self._command("submit", str(manifest), "--journal", str(journal))
            self._command("results", str(journal), "--output", str(output))
            outcomes = [json.loads(line) for line in output.read_text().splitlines()]
            right = sorted(each["custom_id"] for each in outcomes if each["status"] == "succeeded")
            if right == sorted(map(str, range(BULK_LINES))):
                self.ended["bulk lines"] += BULK_LINES
            else:
                self.wrong[f"bulk {number}: {len(right)} of {BULK_LINES} lines"] += 1

    def _command(self, *arguments: str) -> None:
        service = self._rig.command("bulk", *arguments)
        service.start()
        self._rig.wait_for_death(service, timeout=JOB_TIMEOUT_S + SETTLE_S)
        if service.exit_code != 0:
            raise RuntimeError(f"bulk {arguments[0]}: {service.exit_code} {service.last_words()}")


class Hook(Receiver):
    """Takes events, refuses some the first time, and keeps the ids of their jobs alone."""

    def __init__(self) -> None:
        self.jobs: set[str] = set()
        super().__init__(self._behave)

    def _behave(self, got: Got) -> int:
        if got.number == 1 and hash(got.id) % 10 == 0:
            return 500
        self.jobs.add(str(json.loads(got.body)["data"]["id"]))
        self.got.clear()
        return 200


class Day:
    """One run."""

    def __init__(self, rig: Rig, minutes: float, seed: int) -> None:
        self.rig, self.minutes, self.rng = rig, minutes, random.Random(seed)
        self.faults: Counter[str] = Counter()
        self.hook = Hook()
        self.stop, self.calm = threading.Event(), threading.Event()

    def run(self) -> bool:
        """Load and trouble, then calm, then the audit; whether it is clean."""
        with ExitStack() as closing:
            closing.callback(self.hook.close)
            services = self._started()
            kept = [service for name, service in services.items() if name not in ("redis", "s3")]
            keep = threading.Thread(
                target=supervisor.supervise, args=(kept, self.stop), kwargs={"report": say}
            )
            keep.start()
            closing.callback(keep.join)
            closing.callback(self.stop.set)
            return self._day(services)

    def _started(self) -> dict[str, Service]:
        own = {"fronts": FRONTS, "lease_s": 10, "result_ttl": RESULT_TTL_S, "failed_ttl": 3600}
        workers = [self.rig.start_demo_worker(**own) for _ in range(2)]
        environment = {
            "BLIPQ_WEBHOOK_SECRETS": SECRET,
            "BLIPQ_WEBHOOK_ALLOW": "127.0.0.1",
        }
        others = {
            "door": ("api", "--port", "0"),
            "sender": ("webhooks", "run"),
            "exporter": ("metrics", "--port", "0"),
        }
        services = dict(zip(("redis", "s3"), self.rig.stack.services, strict=True))
        services |= {"killed worker": workers[0], "steady worker": workers[1]}
        for name, arguments in others.items():
            services[name] = self.rig.command(*arguments)
            services[name].env |= environment
            services[name].start()
        self.rig.workers += [services[name] for name in others]
        return services

    def _day(self, services: dict[str, Service]) -> bool:
        watch = Watch(services)
        callers = Callers(self.rig, self.hook.url, self.calm)
        door = self._door(services["door"])
        works: list[Callable[[], None]] = [
            *(partial(callers.ask, seed) for seed in range(3)),
            partial(callers.ask_by_http, door, 9),
            partial(callers.read_pages, door),
            callers.run_bulks,
        ]
        threads = [threading.Thread(target=callers.noting(work)) for work in works]
        for thread in threads:
            thread.start()
        try:
            self._make_trouble(services, watch)
        finally:
            self.calm.set()
            for thread in threads:
                thread.join()
        return self._audit(callers, watch)

    def _door(self, door: Service) -> str:
        def url() -> str | None:
            found = re.search(r" is (http://\S+)", door.last_words(100))
            return found[1] if found else None

        wait_until(lambda: url() is not None, "the door", timeout=60)
        return str(url())

    # -- trouble --

    def _make_trouble(self, services: dict[str, Service], watch: Watch) -> None:
        worker, sender = services["killed worker"], services["sender"]
        kinds: dict[str, Callable[[], None]] = {
            "front killed": lambda: self._kill("front", worker),
            "engine killed": lambda: self._kill("engine", worker),
            "worker drained": lambda: worker.signal(signal.SIGTERM),
            "worker killed": lambda: worker.signal(signal.SIGKILL),
            "sender killed": lambda: sender.signal(signal.SIGKILL),
            "Redis killed": self._restart_redis,
        }
        end = time.monotonic() + 60 * self.minutes
        trouble_at, turns = time.monotonic() + TROUBLE_EVERY_S / 2, itertools.cycle(kinds)
        while time.monotonic() < end:
            watch.sample()
            if time.monotonic() > trouble_at:
                trouble_at += TROUBLE_EVERY_S
                kind = next(turns)
                say(kind)
                self.faults[kind] += 1
                kinds[kind]()
            time.sleep(min(SAMPLE_EVERY_S, max(0.0, end - time.monotonic())))

    def _kill(self, role: str, worker: Service) -> None:
        if found := parts.processes(worker, role):
            with suppress(Exception):  # it has just ended by itself
                self.rng.choice(found).kill()

    def _restart_redis(self) -> None:
        self.rig.kill_redis()
        self.rig.start_redis()

    # -- audit --

    def _audit(self, callers: Callers, watch: Watch) -> bool:
        with suppress(AssertionError):  # what is missing then is shown below
            wait_until(lambda: callers.events_expected <= self.hook.jobs, "events", SETTLE_S)
        missing = callers.events_expected - self.hook.jobs
        left = int(self.rig.redis(lambda raw: raw.zcard("blipq:open")))
        forever = self.rig.keys_without_ttl()
        unended = [each for each in callers.ended if not each.endswith(RIGHT)]
        grown = watch.found()
        for each in grown:
            print(_line(each))
        print(f"faults {dict(self.faults)}, repeated {dict(callers.repeated)}")
        print(f"ended {dict(sorted(callers.ended.items()))}")
        print(f"wrong {dict(callers.wrong)}, open {left}, keys without a time to live {forever}")
        print(f"events {len(callers.events_expected)}, of which did not arrive: {len(missing)}")
        # What S3 keeps in memory is its own; Redis' is bounded by the times to live of its keys.
        judged = [each for each in grown if not each.role.startswith(("s3", "redis"))]
        flat = bool(judged) and all(each.is_flat for each in judged)
        missed = [each for each in EXPECTED if not callers.ended[each]]
        print(f"never ended {missed}, processes judged {len(judged)}")
        return flat and not (missed or callers.wrong or unended or missing or left or forever)


def _line(grown: Growth) -> str:
    """A process, its MiB after each quarter of its life, and its files."""
    quarters = "/".join(f"{mib:.0f}" for mib in grown.mib)
    return (
        f"{grown.role:24} {grown.minutes:3.0f} min, {quarters} MiB "
        f"({grown.mib_an_hour:+.1f} an hour), {grown.files} files ({grown.more_files:+})"
        f"{'' if grown.is_flat else '  GROWS'}"
    )


def _png(shown: Scene) -> bytes:
    stream = io.BytesIO()
    render(shown).save(stream, "PNG")
    return stream.getvalue()


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=7)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rig = Rig(Path(folder), forked=False)
        try:
            clean = Day(rig, arguments.minutes, arguments.seed).run()
        finally:
            rig.close()
    print("clean" if clean else "NOT CLEAN")
    return 0 if clean else 1


if __name__ == "__main__":
    sys.exit(main())
