"""The engine as a process of its own: what fronts get from it, and how it ends."""

import hashlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from blipq.local.stack import LocalStack
from blipq_worker.blip2 import Blip2
from blipq_worker.engine.backend import Engine
from blipq_worker.inference import (
    Answer,
    Embed,
    EngineClient,
    EngineGone,
    Generate,
    GenerationParams,
    ImagePixels,
    Item,
    LocalInference,
    Match,
    Rank,
    Rerank,
)
from blipq_worker.process.privacy import HUB_TOKENS
from blipq_worker.serving.engine import SOCKET, forget_hub_tokens
from blipq_worker.serving.pushing import push
from conftest import ROOT, wait_until
from worker.models_in_s3 import Bucket, reach

WRITTEN = GenerationParams(num_beams=1, max_new_tokens=6)
TEXTS = ("a red circle", "a dog")


class Process:
    """An engine process in a folder of its own."""

    def __init__(self, folder: Path, **settings: str) -> None:
        environment = {f"BLIPQ_{name.upper()}": value for name, value in settings.items()}
        path = {"PYTHONPATH": f"{ROOT / 'tests'}:{ROOT}"}
        self.socket = folder / SOCKET
        self.log = folder / "log"
        with self.log.open("ab") as log:
            self.popen = subprocess.Popen(
                [sys.executable, "-m", "worker.serving.faulty_engine", "engine", "--run", folder],
                env={**os.environ, **path, **environment},
                stderr=log,
            )

    def client(self, **options: Any) -> EngineClient:
        return EngineClient(self.socket, timeout_s=90, **options)

    def exit_code(self) -> int:
        return self.popen.wait(30)

    def end(self) -> None:
        self.popen.kill()
        self.popen.wait(10)


def tiny(checkpoints: dict[str, Path]) -> dict[str, str]:
    """Settings that serve the tiny models; what they say makes no sense to a canary."""
    served = f"default={checkpoints['opt']}+{checkpoints['itm']}"
    return {"models": served, "canary": "0", "dtype": "float32", "max_batch_size": "8"}


@contextmanager
def an_engine(**settings: str) -> Iterator[Process]:
    with tempfile.TemporaryDirectory(prefix="bq") as folder:
        process = Process(Path(folder), **settings)
        try:
            yield process
        finally:
            process.end()


@pytest.fixture(scope="module")
def shared_engine(checkpoints: dict[str, Path]) -> Iterator[Process]:
    with an_engine(**tiny(checkpoints)) as process:
        yield process
        assert process.popen.poll() is None, "no test may end it"


@pytest.fixture
def client(shared_engine: Process) -> Iterator[EngineClient]:
    with closing(shared_engine.client(name="one")) as client:
        client.models()
        yield client


@pytest.fixture
def other(shared_engine: Process) -> Iterator[EngineClient]:
    with closing(shared_engine.client(name="other")) as client:
        client.models()
        yield client


def image(client: Any, seed: int = 1) -> ImagePixels:
    """Noise, as the served model takes it."""
    recipes = client.model("default").recipes
    views = [random.Random(seed).randbytes(recipe.size) for recipe in recipes]
    digest = hashlib.sha256(b"".join(views)).hexdigest()
    return ImagePixels(digest, True, tuple(memoryview(view) for view in views))


def ask(client: Any, item: Item, **options: Any) -> "Future[Answer]":
    future: Future[Answer] = client.submit("default", item, "normal", **options)
    return future


def every_type(image: ImagePixels) -> list[Item]:
    return [
        Generate(image, ("a photo of", ""), WRITTEN),
        Generate(image, ("a photo of",), GenerationParams(num_beams=3, max_new_tokens=6)),
        Generate(image, ("a photo",), GenerationParams(num_beams=1, do_sample=True, seed=7)),
        Rank(image, ("a photo of",), TEXTS),
        Match(image, TEXTS),
        Match(image, TEXTS, "itc"),
        Rerank(image, TEXTS[0]),
        Embed("image", image),
        Embed("text", None, TEXTS[0]),
        Embed("multimodal", image, TEXTS[0]),
    ]


def numbers(answer: Answer) -> list[float] | list[str]:
    """The numbers of an answer, or its texts."""
    value: Any = answer.value
    if hasattr(value, "texts"):
        return [each.text for texts in value.texts for each in texts]
    if hasattr(value, "arrays"):
        arrays = [np.frombuffer(each.data, "<f4") for each in value.arrays.values()]
        return [float(each) for each in np.concatenate(arrays)]
    fields = [getattr(value, name) for name in value.__struct_fields__]
    return [float(each) for each in np.ravel(fields)]


def same(one: Answer, other: Answer) -> None:
    first, second = numbers(one), numbers(other)
    if isinstance(first[0], str):
        assert first == second
    else:
        np.testing.assert_allclose(first, second, atol=1e-4)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def expected(opt: Blip2) -> list[Answer]:
    """What the same model says in this process."""
    engine = Engine({"default": opt}, max_batch_size=8, batch_wait_timeout_s=0, max_waiting=64)
    engine.batcher.start()
    local = LocalInference(engine)
    answers = [ask(local, item).result(60) for item in every_type(image(local))]
    engine.batcher.close(10)
    return answers


def blocked(client: EngineClient, seed: int = 2) -> "Future[Answer]":
    """An item whose pass has begun, and takes so long that others wait meanwhile."""
    blocker = ask(client, Match(image(client, seed), ("slow",)))
    wait_until(lambda: client._connection and client._connection._started, "its pass")
    return blocker


def gone(future: "Future[Answer]") -> EngineGone:
    error = future.exception(30)
    assert isinstance(error, EngineGone), error
    return error


# --- what fronts get ------------------------------------------------------------------------------


def test_a_front_gets_what_the_model_says_in_one_process(
    client: EngineClient, expected: list[Answer]
) -> None:
    answers = [ask(client, item).result(60) for item in every_type(image(client))]
    for one, two in zip(answers, expected, strict=True):
        same(one, two)
    assert client.model("default").slots == 32
    features = ("generation", "retrieval", "patches")
    assert client.knows("default", [str(image(client).digest)], features) == (True,)


def test_equal_items_of_two_fronts_are_computed_once(
    client: EngineClient, other: EngineClient
) -> None:
    blocker = blocked(client)
    items = [Match(image(client, 3), TEXTS), Generate(image(client, 3), ("a photo",), WRITTEN)]
    futures = [ask(each, item) for item in items for each in (client, other)]
    blocker.result(60)
    answers = [future.result(60) for future in futures]
    for one, two in (answers[:2], answers[2:]):
        assert {one.shared, two.shared} == {False, True}
        same(one, two)


def test_a_front_that_leaves_takes_no_equal_item_along(
    client: EngineClient, shared_engine: Process
) -> None:
    with closing(shared_engine.client(name="leaves")) as leaving:
        leaving.models()  # it is connected before the pass: the engine welcomes nobody meanwhile
        blocker = blocked(client)
        left = ask(leaving, Match(image(client, 4), TEXTS))
        time.sleep(0.1)
        stays = ask(client, Match(image(client, 4), TEXTS))
    assert not gone(left).started
    blocker.result(60)
    assert stays.result(60).value


def test_items_of_one_image_are_encoded_once_for_all_fronts(
    client: EngineClient, other: EngineClient
) -> None:
    ask(client, Match(image(client, 5), TEXTS)).result(60)
    again = ask(other, Match(image(client, 5), ("a cat",))).result(60)
    assert again.vision_ms == 0
    assert not again.shared


def test_an_item_runs_alone_beside_a_full_load(client: EngineClient, other: EngineClient) -> None:
    dice = random.Random(1)

    def load(who: EngineClient, seed: int) -> "Future[Answer]":
        params = GenerationParams(num_beams=1, max_new_tokens=dice.randint(2, 40))
        return ask(who, Generate(image(client, 100 + seed % 9), (f"{seed}",), params))

    futures = [load(who, seed) for seed in range(60) for who in (client, other)]
    alone = [
        ask(other, Generate(image(client, 6), ("a photo of",), WRITTEN), alone=True),
        ask(other, Match(image(client, 6), TEXTS), alone=True),
    ]
    futures += [load(client, seed) for seed in range(60, 90)]
    assert [future.result(60).batch_size for future in alone] == [1, 1]
    assert max(future.result(60).batch_size for future in futures) > 8


def test_garbage_on_the_socket_harms_no_job(client: EngineClient, shared_engine: Process) -> None:
    dice = random.Random(5)
    garbage = [b"", b"bq", dice.randbytes(24), dice.randbytes(70_000), b"\0" * 300_000]

    def throw(data: bytes) -> None:
        with socket.socket(socket.AF_UNIX) as raw:
            raw.connect(str(shared_engine.socket))
            raw.settimeout(5)
            try:
                raw.sendall(data)
            except OSError:
                return  # it was cut while it sent

    params = GenerationParams(num_beams=1, max_new_tokens=30)
    with ThreadPoolExecutor(4) as pool:
        futures = [
            ask(client, Generate(image(client, seed % 5), (f"{seed}",), params))
            for seed in range(40)
        ]
        thrown = [pool.submit(throw, dice.choice(garbage)) for _ in range(60)]
        assert all(future.result(60).value for future in futures)
        assert [each.result(30) for each in thrown] == [None] * 60
    assert client.connected


def test_a_frozen_engine_is_noticed_and_goes_on_when_it_thaws(shared_engine: Process) -> None:
    with closing(shared_engine.client(silence_s=1.5)) as client:
        blocker = blocked(client)
        waiting = ask(client, Match(image(client, 2), TEXTS, "itc"))
        shared_engine.popen.send_signal(signal.SIGSTOP)
        try:
            assert gone(blocker).started
            assert not gone(waiting).started
        finally:
            shared_engine.popen.send_signal(signal.SIGCONT)
        wait_until(lambda: client.connected, "the engine")
        assert ask(client, Match(image(client, 2), TEXTS, "itc")).result(60).value


def test_an_idle_engine_answers_at_once(client: EngineClient) -> None:
    """It waits at its socket: nothing is polled for."""
    item = Embed("text", None, "a photo")
    ask(client, item).result(60)
    took = []
    for _ in range(20):
        time.sleep(0.01)
        started = time.monotonic()
        answer = ask(client, item).result(60)
        took.append((time.monotonic() - started) * 1000 - answer.pass_ms)
    assert min(took) < 50  # far below a beat: on a busy machine, too


def test_an_idle_engine_shows_that_it_lives(client: EngineClient) -> None:
    """Whoever watches it must not take it for frozen: each of its beats differs from the last."""
    ask(client, Embed("text", None, "a photo")).result(60)
    for _ in range(3):
        wait_until(lambda: client.beat is not None, "a beat")
        wait_until(lambda last=client.beat: client.beat not in (None, last), "the next")
        assert client.beat is not None
        assert (client.beat.running, client.beat.progress_s) == (0, 0.0)


# --- how it ends ----------------------------------------------------------------------------------


def test_a_killed_pass_names_its_suspects_and_the_next_engine_goes_on(
    checkpoints: dict[str, Path],
) -> None:
    with an_engine(**tiny(checkpoints)) as engine, closing(engine.client()) as client:
        blocker = blocked(client)
        killer, beside = (ask(client, Match(image(client), (text,))) for text in ("die", "a cat"))
        later = ask(client, Match(image(client), TEXTS, "itc"))
        blocker.result(60)
        assert gone(killer).started
        assert gone(beside).started
        assert not gone(later).started
        assert engine.exit_code() == -signal.SIGKILL
        following = Process(engine.socket.parent, **tiny(checkpoints))
        try:  # the socket of the killed one was in its way
            assert ask(client, Match(image(client), TEXTS, "itc")).result(60).value
            assert "start: " in following.log.read_text()
            # It goes on as long as a front is there.
            following.popen.send_signal(signal.SIGTERM)
            time.sleep(0.5)
            assert ask(client, Match(image(client), TEXTS)).result(60).value
            client.close()
            assert following.exit_code() == 0
        finally:
            following.end()


def test_a_lost_device_ends_it_and_names_the_suspects(checkpoints: dict[str, Path]) -> None:
    with an_engine(**tiny(checkpoints)) as engine, closing(engine.client()) as client:
        blocker = blocked(client)
        lost = ask(client, Match(image(client), ("lost",)))
        later = ask(client, Match(image(client), TEXTS, "itc"))
        blocker.result(60)
        assert gone(lost).started
        assert not gone(later).started
        assert engine.exit_code() == 70
        assert "the device is lost" in engine.log.read_text()


def test_a_model_that_fails_its_check_ends_it_with_the_reason(
    checkpoints: dict[str, Path],
) -> None:
    with an_engine(models="default=demo", drain_timeout_s="0") as engine:
        with closing(engine.client()) as client:
            ask(client, Match(image(client), ("a red circle",))).result(60)
            # One picture whose items fail says nothing about the model, nor does any number of
            # items of one job.
            one = image(client)
            for _ in range(6):
                assert ask(client, Match(one, ("bad",))).exception(60)
            assert ask(client, Match(image(client), ("a red circle",))).result(60)
            futures = [ask(client, Match(image(client, n), ("break",))) for n in range(4)]
            errors = [str(future.exception(60)) for future in futures]
            assert engine.exit_code() == 78
        assert any("model 'default' failed its check" in error for error in errors)
        assert "blipq engine: model 'default' failed its check" in engine.log.read_text()


def test_a_front_that_does_not_leave_is_not_waited_for(checkpoints: dict[str, Path]) -> None:
    settings = {**tiny(checkpoints), "drain_timeout_s": "0.5"}
    with an_engine(**settings) as engine, closing(engine.client()) as client:
        client.models()
        engine.popen.send_signal(signal.SIGTERM)
        future = ask(client, Match(image(client), TEXTS))  # it is no less served until then
        assert future.result(60).value
        assert engine.exit_code() == 0
        wait_until(lambda: not client.connected, "its end")
        # The next try to connect overwrites it.
        assert "its time to drain is over" in client._why or "no engine at" in client._why


MAIN = """
import json, os, signal, sys
from pathlib import Path
from blipq.local.supervisor import Service
from blipq_worker.inference import EngineClient, Match
from worker.serving.test_engine_process import SOCKET, ask, image, wait_until
folder = sys.argv[1]
command = [sys.executable, "-m", "worker.serving.faulty_engine", "engine", "--run", folder]
engine = Service("engine", command, env=json.loads(sys.argv[2]), log=Path(folder) / "log")
engine.start()
client = EngineClient(Path(folder) / SOCKET, timeout_s=90)
ask(client, Match(image(client), ("hang",)))
wait_until(lambda: client._connection._started, "the pass that hangs", 60)
print(engine.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_an_engine_that_hangs_does_not_outlive_its_main_process(
    checkpoints: dict[str, Path],
) -> None:
    settings = {**tiny(checkpoints), "drain_timeout_s": "0.5"}
    environment = {f"BLIPQ_{name.upper()}": value for name, value in settings.items()}
    with tempfile.TemporaryDirectory(prefix="bq") as folder:
        main = subprocess.run(
            [sys.executable, "-c", MAIN, folder, json.dumps(environment)],
            env={**os.environ, "PYTHONPATH": f"{ROOT / 'tests'}:{ROOT}"},
            stdout=subprocess.PIPE,
            text=True,
            timeout=120,
        )
        assert main.returncode == -signal.SIGKILL
        engine = psutil.Process(int(main.stdout))
        try:
            wait_until(
                lambda: not engine.is_running() or engine.status() == psutil.STATUS_ZOMBIE,
                "its end",
                20,
            )
        finally:
            with suppress(psutil.NoSuchProcess):
                engine.kill()


@pytest.mark.parametrize(
    ("models", "told"), [("default=/nowhere", "model 'default'"), ("a b=demo", "BLIPQ_MODELS.a b")]
)
def test_what_keeps_a_model_from_being_served_is_one_line_and_no_second_try(
    tmp_path: Path, models: str, told: str
) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "blipq_worker", "engine", "--run", str(tmp_path)],
        env={**os.environ, "BLIPQ_MODELS": models, "BLIPQ_LOG_LEVEL": "ERROR"},
        capture_output=True,
        text=True,
        timeout=90,
    )
    assert ended.returncode == 78, ended.stderr
    (line,) = ended.stderr.splitlines()
    assert line.startswith("blipq engine: ")
    assert told in line
    assert not (tmp_path / SOCKET).exists()


def test_it_keeps_no_credentials_for_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in HUB_TOKENS:
        monkeypatch.setenv(name, "secret")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    forget_hub_tokens()
    assert "secret" not in os.environ.values()
    assert os.environ["HF_HUB_OFFLINE"] == "1"


#: An engine that has loaded its model, and says what it keeps instead of serving.
KEEPS = """
import gc, json, os, sys
from pathlib import Path
from blipq_worker.serving import engine
from blipq_worker.settings import WorkerSettings

def told(self):
    held = {type(each).__name__ for each in gc.get_objects()}
    held &= {"Credentials", "Storage", "Settings", "ModelS3Settings", "S3"}
    print(json.dumps({"environment": dict(os.environ), "held": sorted(held)}), flush=True)
    return 0

engine.EngineProcess.run = told
sys.exit(engine.run_engine(Path(sys.argv[1]), WorkerSettings()))
"""


def test_it_keeps_no_keys_of_the_store_that_it_read_its_weights_from(
    stack: LocalStack, checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket = Bucket(stack)
    reach(bucket.settings, monkeypatch)
    place = bucket.place()
    push(checkpoints["opt"], place)
    monkeypatch.setenv("BLIPQ_MODELS", f"default={place}")
    monkeypatch.setenv("BLIPQ_CANARY", "0")
    monkeypatch.setenv("BLIPQ_DTYPE", "float32")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "of-a-role")
    with tempfile.TemporaryDirectory(prefix="bq") as folder:
        ended = subprocess.run(
            [sys.executable, "-c", KEEPS, folder], capture_output=True, text=True, timeout=90
        )
    assert ended.returncode == 0, ended.stderr
    kept = json.loads(ended.stdout)
    reaching = ("AWS_", "BLIPQ_MODEL_S3_")
    assert not [name for name in kept["environment"] if name.startswith(reaching)]
    assert kept["held"] == []


def test_it_loads_nothing_that_takes_jobs_or_images() -> None:
    code = (
        "import sys, blipq_worker.__main__, blipq_worker.serving.engine\n"
        "names = {'celery', 'kombu', 'lancedb'}\n"
        "names |= {'blipq_worker.' + each for each in ('jobs', 'images', 'messages', 'index')}\n"
        "print(sorted(names & set(sys.modules)))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=90)
    assert ran.stdout.strip() == "[]", ran.stderr


def test_graphs_that_end_the_process_are_tried_once(
    checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would have been started again and again, and never have served."""
    monkeypatch.setenv("FAULTY_GRAPHS", "die")
    with tempfile.TemporaryDirectory(prefix="bq") as folder:
        first = Process(Path(folder), **tiny(checkpoints))
        assert first.exit_code() == -signal.SIGABRT
        second = Process(Path(folder), **tiny(checkpoints))
        try:
            with closing(second.client(name="one")) as client:
                assert "default" in client.models()
            assert "the last one ended while it captured graphs" in second.log.read_text()
        finally:
            second.end()


def test_an_engine_that_is_ended_while_it_captures_graphs_leaves_them_on(
    checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAULTY_GRAPHS", "hang")
    with an_engine(**tiny(checkpoints)) as process:
        note = process.socket.parent / "capturing"
        wait_until(note.exists, "the note")
        process.popen.terminate()
        assert process.exit_code() == 0
        assert not note.exists()
