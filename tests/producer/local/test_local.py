"""The local stack: real servers that leave nothing behind."""

import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from blipq import Client, Settings
from blipq.backoff import Backoff
from blipq.ledger.connection import connect
from blipq.ledger.worker import WorkerLedger
from blipq.local.sample import red_square
from blipq.local.stack import LocalStack, StackError, free_port
from blipq.local.supervisor import Service, supervise
from blipq.s3.outputs import why_refused
from blipq.s3.storage import Storage
from blipq.settings import read_stack_file
from blipq.webhooks.delivery import new_secret
from conftest import blipq, wait_until


def listens(port: int | None) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def dead_sockets_in_tmp() -> set[Path]:
    """Those of servers that no longer live; other tests' stacks may be starting."""
    return {path for path in Path("/tmp").glob("seaweedfs-*.sock") if not answers(path)}


def answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(str(path)) == 0


def lives(pid: int) -> bool:
    with suppress(OSError, ValueError):
        return Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0] != "Z"
    return False


def test_a_stopped_stack_leaves_no_process_port_or_file(tmp_path: Path) -> None:
    before = dead_sockets_in_tmp()
    stack = LocalStack(tmp_path / "stack")
    stack.start()
    pids = [service.pid for service in stack.services]
    assert listens(stack.redis_port)
    assert listens(stack.s3_port)
    stack.stop()
    assert not any(map(lives, pids))
    assert not any(map(listens, (stack.redis_port, stack.s3_port, *stack._inner_ports)))
    # Another test's stack may be between its server's end and its own clearing up.
    wait_until(lambda: dead_sockets_in_tmp() <= before, "no socket left behind")


def test_secrets_are_readable_by_their_owner_alone(stack: LocalStack) -> None:
    assert stat.S_IMODE(stack.folder.stat().st_mode) == 0o700
    for file in ("redis/redis.conf", "s3.json"):
        assert stat.S_IMODE((stack.folder / file).stat().st_mode) == 0o600


def test_its_workers_may_write_outputs_to_a_bucket_of_their_own(
    stack: LocalStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    allowed = stack.environment()["BLIPQ_ALLOWED_OUTPUTS"]
    uri = f"s3://{allowed}/answer.json"
    assert why_refused(uri, (allowed,), stack.settings()) is None
    assert Storage(stack.settings()).has_bucket(allowed)
    monkeypatch.setenv("BLIPQ_ALLOWED_OUTPUTS", "answers")
    assert stack.environment()["BLIPQ_ALLOWED_OUTPUTS"] == "answers"


def test_a_taken_port_is_told(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        stack = LocalStack(tmp_path, redis_port=port)
        with pytest.raises(StackError, match=f"port {port} is taken.*--redis-port"):
            stack.start()
    assert stack.services == []


def test_a_folder_that_another_stack_uses_is_told(stack: LocalStack) -> None:
    with pytest.raises(StackError, match=r"another stack runs in .*choose another --folder"):
        LocalStack(stack.folder).start()
    with connect(stack.settings()) as raw:
        assert raw.ping(), "the first goes on"


def test_a_folder_can_be_used_again_after_its_stack_has_stopped(tmp_path: Path) -> None:
    for _ in range(2):
        stack = LocalStack(tmp_path / "stack")
        stack.start()
        stack.stop()


def test_a_folder_that_is_a_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    told = blipq("up", "--folder", str(tmp_path / "file")).stderr
    assert "is a file" in " ".join(told.replace("│", " ").split())


def test_a_number_that_is_no_port_is_told() -> None:
    assert "must be at most 65,535" in blipq("up", "--redis-port", "99999").stderr


@pytest.mark.parametrize("which", ["redis", "s3", "inner"])
def test_a_chosen_port_that_was_taken_meanwhile_is_chosen_anew(tmp_path: Path, which: str) -> None:
    stack = LocalStack(tmp_path / "stack")
    port = {"redis": stack.redis_port, "s3": stack.s3_port, "inner": stack._inner_ports[0]}[which]
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port))
        stack.start()
        assert port not in (stack.redis_port, stack.s3_port, *stack._inner_ports)
        assert listens(stack.redis_port)
        assert listens(stack.s3_port)
        stack.stop()


def test_a_given_port_is_never_replaced(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        stack = LocalStack(tmp_path / "stack", s3_port=taken.getsockname()[1])
        with pytest.raises(StackError, match="s3 did not start"):
            stack.start()
    assert stack.s3_port == stack._given_ports[1]


def test_a_stack_is_announced_and_withdrawn(
    stack: LocalStack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "cache" / "stack.json"
    monkeypatch.setenv("BLIPQ_STACK_FILE", str(path))
    stack.announce()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with Client() as client:
        assert client.settings.endpoint_source == "local stack"
    stack.withdraw()
    assert read_stack_file() is None


# --- blipq up and down ----------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path) -> dict[str, str]:
    return {"BLIPQ_STACK_FILE": str(tmp_path / "stack.json"), "XDG_CACHE_HOME": str(tmp_path)}


def up(cache: dict[str, str], folder: Path, *more: str) -> subprocess.Popen[str]:
    names = ("--redis-port", "--s3-port", "--api-port")
    ports = [part for name in names for part in (name, str(free_port()))]
    command = [sys.executable, "-m", "blipq", "up", "--folder", str(folder), *ports, *more]
    return subprocess.Popen(command, env={**os.environ, **cache}, stderr=subprocess.PIPE, text=True)


def test_up_serves_this_machine_until_down(tmp_path: Path, cache: dict[str, str]) -> None:
    cache |= {"BLIPQ_WEBHOOK_SECRETS": new_secret()}
    running = up(cache, tmp_path / "stack", "--no-worker")
    wait_until(Path(cache["BLIPQ_STACK_FILE"]).exists, "the stack")
    wait_until(
        lambda: json.loads(blipq("webhooks", "list", "--json", **cache).stdout)["senders"],
        "a sender",
    )
    found = blipq("status", "job_1", **cache)
    assert found.returncode == 4
    assert "(local stack)" in found.stderr
    again = blipq("up", "--no-worker", **cache)
    assert again.returncode == 1
    assert f"runs already (pid {running.pid})" in again.stderr
    stopped = blipq("down", **cache)
    assert (stopped.returncode, stopped.stderr) == (0, "stopped\n")
    _, told = running.communicate(timeout=30)
    assert running.returncode == 0, told
    assert not Path(cache["BLIPQ_STACK_FILE"]).exists()


def test_up_answers_http_with_a_key_that_it_shows_once(
    tmp_path: Path, cache: dict[str, str]
) -> None:
    folder = tmp_path / "stack"
    kept = folder / "api" / "keys.key"
    shown = []
    for _ in range(2):
        running = up(cache, folder, "--no-worker")
        assert running.stderr is not None
        lines: list[str] = []
        while not lines or "its key" not in lines[-1]:
            lines.append(running.stderr.readline())
            assert lines[-1], "".join(lines)
        (address,) = re.findall(r"HTTP at (http://[\d.:]+)", lines[-2])
        key = kept.read_text().strip()
        request = urllib.request.Request(f"{address}/v1/jobs")
        with pytest.raises(urllib.error.HTTPError, match="401") as refused:
            urllib.request.urlopen(request, timeout=10)
        refused.value.close()
        request.add_header("Authorization", f"Bearer {key}")
        with urllib.request.urlopen(request, timeout=10) as answer:
            assert json.load(answer)["jobs"] == []
        shown.append(key in "".join(lines))
        assert stat.S_IMODE(kept.stat().st_mode) == 0o600
        stopped = blipq("down", **cache)
        assert (stopped.returncode, stopped.stderr) == (0, "stopped\n")
        running.communicate(timeout=30)
        with pytest.raises(urllib.error.URLError):
            urllib.request.urlopen(f"{address}/health", timeout=5)
    assert shown == [True, False]
    assert key not in (folder / "api.log").read_text()


def test_up_says_how_to_reach_it_and_ends_its_start_with_a_line_to_try(
    tmp_path: Path, cache: dict[str, str]
) -> None:
    """The password was told nowhere: whatever was not blipq itself ended in NOAUTH."""
    running = up(cache, tmp_path / "stack", "--no-worker")
    try:
        wait_until(Path(cache["BLIPQ_STACK_FILE"]).exists, "the stack")
        told = blipq("env", "--json", **cache)
        settings = Settings(redis_url=json.loads(told.stdout)["BLIPQ_REDIS_URL"])
        with connect(settings) as raw:  # a worker that has loaded its model
            info = json.dumps({"models": ["default"]})
            WorkerLedger(raw, settings).register("w1", ["default"], info, ttl_s=60, spare=False)
        assert running.stderr is not None
        said = "".join(iter(running.stderr.readline, "\n"))  # up to the empty line
        said += running.stderr.readline()
    finally:
        running.send_signal(signal.SIGTERM)
        running.communicate(timeout=30)
    picture = tmp_path / "stack" / "red-square.png"
    assert 'eval "$(blipq env)"' in said
    assert said.endswith(f"try in another terminal:\n    blipq caption {picture}\n")
    assert picture.read_bytes() == red_square()


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_stack(tmp_path: Path, cache: dict[str, str], sign: int) -> None:
    running = up(cache, tmp_path / "stack", "--no-worker")
    wait_until(Path(cache["BLIPQ_STACK_FILE"]).exists, "the stack")
    running.send_signal(sign)
    _, told = running.communicate(timeout=30)
    assert (running.returncode, "stopping" in told) == (0, True)


def test_a_killed_stack_takes_its_servers_along(tmp_path: Path, cache: dict[str, str]) -> None:
    running = up(cache, tmp_path / "stack", "--no-worker")
    wait_until(Path(cache["BLIPQ_STACK_FILE"]).exists, "the stack")
    wait_until(lambda: len(_children(running.pid)) == 3, "Redis, S3 and the HTTP door")
    children = [int(pid) for pid in _children(running.pid)]
    commands = " ".join(Path(f"/proc/{pid}/cmdline").read_text() for pid in children)
    running.kill()
    running.communicate(timeout=30)
    wait_until(lambda: not any(map(lives, children)), "the servers to end")
    for port in re.findall(r"port[a-z.]*=(\d+)", commands):  # nobody was left to remove these
        for socket_file in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
            socket_file.unlink()
    assert blipq("down", **cache).stderr == "no local stack is running\n"


def _children(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def test_down_without_a_stack_says_so(cache: dict[str, str]) -> None:
    down = blipq("down", **cache)
    assert (down.returncode, down.stderr) == (0, "no local stack is running\n")


def test_up_on_a_taken_port_fails_with_one_line(tmp_path: Path, cache: dict[str, str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
        folder = str(tmp_path / "stack")
        ports = ("--redis-port", port, "--api-port", str(free_port()))
        failed = blipq("up", "--no-worker", "--folder", folder, *ports, **cache)
    assert failed.returncode == 1
    assert f"port {port} is taken" in failed.stderr
    assert "Traceback" not in failed.stderr


def test_up_in_a_folder_that_cannot_be_made_fails_with_one_line(cache: dict[str, str]) -> None:
    failed = blipq("up", "--no-worker", "--folder", "/dev/null/stack", **cache)
    assert failed.returncode == 1
    assert failed.stderr == "blipq: cannot use /dev/null/stack: Not a directory\n"


# --- the supervisor -------------------------------------------------------------------------------


@pytest.fixture
def supervised(tmp_path: Path) -> Callable[[str], Service]:
    return lambda code: Service("child", [sys.executable, "-c", code], log=tmp_path / "log")


def test_a_service_that_keeps_dying_is_started_again_and_told(
    supervised: Callable[[str], Service], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("blipq.local.supervisor.RESTARTS", Backoff(0.01, 30.0))
    service, stop, told = supervised("raise SystemExit(3)"), threading.Event(), []
    service.start()

    def report(text: str) -> None:
        told.append(text)
        if "started again" in text:
            stop.set()

    assert supervise([service], stop, report=report) == 0
    assert "child ended with 3" in told or "child was started again" in told[0]
    service.stop()


def test_a_service_that_must_not_start_again_ends_the_supervision(
    supervised: Callable[[str], Service],
) -> None:
    service = supervised("raise SystemExit(78)")
    service.start()
    assert supervise([service], threading.Event(), report=str, give_up_on=(78,)) == 78


def test_services_may_be_given_up_one_by_one() -> None:
    """A worker whose GPU was bad ended those on all other GPUs of its host."""
    gone = Service("bad", [sys.executable, "-c", "raise SystemExit(78)"])
    stop, told = threading.Event(), []

    def report(text: str) -> None:
        told.append(text)
        stop.set()

    gone.start()
    assert supervise([gone], stop, report=report, give_up_on=(78,), one_by_one=True) == 78
    assert not told, "nobody is left"
    go_on = Service("well", [sys.executable, "-c", "import time; time.sleep(60)"])
    go_on.start()
    try:
        services = [gone, go_on]
        assert supervise(services, stop, report=report, give_up_on=(78,), one_by_one=True) == 0
        assert told == ["bad ended with 78, and is not started again"]
        assert go_on.pid is not None
    finally:
        go_on.stop()


#: Adopts what its children leave, as the first process of a container does.
FIRST = """
import ctypes, subprocess, sys, threading
from blipq.local.supervisor import Service, supervise
ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)
service = Service("child", [sys.executable, "-c", "import time; time.sleep(60)"])
service.start()
subprocess.run(["sh", "-c", "sleep 1 & echo $!"], check=True)
supervise([service], threading.Event(), reaps=True)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="a container's first process is Linux's")
def test_what_others_leave_to_the_first_process_of_a_container_is_no_zombie() -> None:
    first = subprocess.Popen([sys.executable, "-c", FIRST], stdout=subprocess.PIPE, text=True)
    try:
        assert first.stdout is not None
        orphan = int(first.stdout.readline())
        wait_until(lambda: not Path(f"/proc/{orphan}").exists(), "the orphan's end", timeout=60)
        assert first.poll() is None
    finally:
        first.kill()
        first.communicate(timeout=30)


@pytest.mark.skipif(sys.platform != "linux", reason="a container's first process is Linux's")
def test_how_a_service_of_such_a_process_ended_is_known_all_the_same(
    supervised: Callable[[str], Service],
) -> None:
    service = supervised("raise SystemExit(78)")
    service.start()
    done = supervise([service], threading.Event(), report=str, give_up_on=(78,), reaps=True)
    assert done == 78


def test_a_service_that_ignores_sigterm_is_killed(supervised: Callable[[str], Service]) -> None:
    code = "import signal, time; signal.signal(15, signal.SIG_IGN); print('up', flush=True)"
    service = supervised(f"{code}; time.sleep(60)")
    service.start()
    wait_until(lambda: "up" in service.last_words(), "the child")
    service.stop(timeout=0.1)
    assert service.exit_code == -signal.SIGKILL


def test_the_last_words_of_a_service_are_its_logs_end(
    supervised: Callable[[str], Service],
) -> None:
    service = supervised("print(*range(20), sep='\\n')")
    service.start()
    wait_until(lambda: service.exit_code == 0, "the child")
    assert service.last_words(2) == "18\n19"
    assert (service.pid, service.exit_code) == (None, 0)
