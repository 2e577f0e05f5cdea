"""URLs of Redis: whatever the settings take, the ledger and Celery both understand."""

import asyncio
import socketserver
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import redis

from blipq import AsyncClient, Client, InvalidRequest, QueueUnavailable, Settings
from blipq.ledger.connection import connect
from blipq.local.stack import free_port, redis_command
from blipq.local.supervisor import Service
from blipq.redis.url import RedisUrl
from blipq.submission import checked
from blipq.transport.broker import broker_address, make_app
from conftest import wait_until

IMAGE = "s3://uploads/cat.jpg"


@pytest.fixture
def socket_file(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A Redis with a password that listens on a file alone."""
    folder = tmp_path_factory.mktemp("r")
    path = folder / "r.sock"
    options = {"--port": 0, "--unixsocket": path, "--dir": folder, "--requirepass": "p@ss/#?"}
    command = [redis_command(), *(str(part) for pair in options.items() for part in pair)]
    service = Service("redis", command, log=folder / "redis.log")
    service.start()
    wait_until(path.exists, "the socket")
    yield path
    service.stop()


class NoRedis(socketserver.BaseRequestHandler):
    """A server of HTTP, as it answers what is none."""

    def handle(self) -> None:
        self.request.recv(1024)
        self.request.sendall(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n")


def ask(settings: Settings) -> None:
    with Client(settings) as client:
        client.caption(IMAGE)


def ask_async(settings: Settings) -> None:
    async def submit() -> None:
        async with AsyncClient(settings) as client:
            await client.caption(IMAGE)

    asyncio.run(submit())


@pytest.mark.parametrize("submit", [ask, ask_async])
def test_another_server_at_the_port_of_redis_is_named_as_such(
    submit: Callable[[Settings], None],
) -> None:
    """It once was a traceback of redis-py's parser."""
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), NoRedis) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        settings = Settings(redis_url=f"redis://127.0.0.1:{server.server_address[1]}/0")
        try:
            with pytest.raises(QueueUnavailable, match="no Redis, perhaps HTTP"):
                submit(settings)
        finally:
            server.shutdown()


def test_a_cluster_is_refused_as_what_it_is(tmp_path: Path) -> None:
    """It once was a traceback of redis-py."""
    port = free_port()
    options = {"--port": port, "--dir": tmp_path, "--save": "", "--cluster-enabled": "yes"}
    options["--cluster-port"] = free_port()  # else 10,000 above the other, which may be no port
    command = [redis_command(), *(str(part) for pair in options.items() for part in pair)]
    service = Service("redis", command, log=tmp_path / "redis.log")
    service.start()
    settings = Settings(redis_url=f"redis://127.0.0.1:{port}/0")
    try:
        with connect(settings) as raw:
            wait_until(lambda: gives_slots(raw), "all slots", timeout=60)
            with pytest.raises(QueueUnavailable, match="it is a Redis Cluster, which"):
                ask(settings)
            assert raw.dbsize() == 0, "nothing of a refused job is left"
    finally:
        service.stop()


def gives_slots(raw: redis.Redis) -> bool:
    """Whether the node serves all of the cluster's slots; it is given those that are nobody's."""
    with suppress(redis.RedisError):
        info = raw.execute_command("CLUSTER", "INFO")
        if "cluster_slots_assigned:0" in str(info):
            raw.execute_command("CLUSTER", "ADDSLOTSRANGE", 0, 16383)
        return "cluster_state:ok" in str(info)
    return False


def test_a_job_goes_through_a_unix_socket(socket_file: Path) -> None:
    settings = Settings(redis_url=f"unix://:p%40ss%2F%23%3F@{socket_file}?db=3")
    with Client(settings) as client:
        job = client.caption(IMAGE)
        assert job.status() == "queued"
        wait_until(lambda: client.ledger.redis.llen("blipq.default.normal") == 1, "the message")

    async def submit() -> str:
        async with AsyncClient(settings) as client:
            return (await client.caption(IMAGE)).id

    assert asyncio.run(submit())
    with connect(settings) as raw:
        wait_until(lambda: raw.llen("blipq.default.normal") == 2, "the messages")
        assert raw.connection_pool.connection_kwargs["db"] == 3


URLS = {
    "redis://:p%40ss%2Fw%23@127.0.0.1:6379/0": ("p@ss/w#", ["127.0.0.1:6379"], "0"),
    "redis://user:a%3Ab%3Bc@queue/2": ("a:b;c", ["queue:6379"], "2"),
    "redis://127.0.0.1?db=3": (None, ["127.0.0.1:6379"], "3"),
    "redis://[::1]:6390/1": (None, ["::1:6390"], "1"),
    "rediss://:pw@queue:6380/0": ("pw", ["queue:6380"], "0"),
    "sentinel://:p%40w@[::1]:26379,two/4?master=m": ("p@w", ["::1:26379", "two:26379"], "4"),
    "sentinels://:pw@one/0": ("pw", ["one:26379"], "0"),
}


@pytest.mark.parametrize("url", URLS)
def test_celery_reads_the_url_as_the_ledger_does(url: str) -> None:
    password, hosts, database = URLS[url]
    parsed = RedisUrl.of(url)
    assert [f"{host}:{port}" for host, port in parsed.hosts] == hosts
    with make_app(Settings(redis_url=url)).connection_for_write() as connection:
        assert f"{connection.hostname}:{connection.port}" == hosts[0]
        assert connection.password == password == parsed.password
        assert connection.virtual_host == database == str(parsed.database)


def test_the_name_of_a_client_is_told_by_both_sides() -> None:
    settings = Settings(redis_url="redis://127.0.0.1/0?client_name=web")
    with connect(settings) as raw:
        assert raw.connection_pool.connection_kwargs["client_name"] == "web"
    assert broker_address(settings).options["client_name"] == "web"


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("redis://127.0.0.1/abc", "the database is a number"),
        ("redis://127.0.0.1/0?health_check_interval=10", "takes db, client_name alone"),
        ("sentinel://h/0?protocol=3", "takes db, client_name, master, sentinel_password alone"),
        ("redis://127.0.0.1/0?ssl_ca_certs=ca.pem", "rediss:// is Redis over TLS"),
        ("rediss://127.0.0.1/0?ssl_cert_reqs=maybe", "ssl_cert_reqs is"),
        ("redis://127.0.0.1:99999/0", "HOST:PORT"),
        ("unix://", "names a path"),
        ("unix://tmp/r.sock", "names a path"),
        ("sentinel://", "needs a host"),
        ("redis://127.0.0.1/0\n", "white space"),
    ],
)
def test_what_only_one_side_would_understand_is_refused_before_a_job_is_recorded(
    url: str, told: str
) -> None:
    for field in ("redis_url", "broker_url"):
        with pytest.raises(InvalidRequest, match=field) as refused:
            checked(Settings, **{field: url})
        assert told in str(refused.value)


def test_options_of_another_broker_are_left_to_its_transport() -> None:
    settings = Settings(broker_url="amqp://user:pw@rabbit//?heartbeat=10")
    assert broker_address(settings).url == settings.broker_url
    verified = Settings(broker_url="amqps://rabbit//?heartbeat=10&ssl_ca_certs=ca.pem")
    assert broker_address(verified).url == "amqps://rabbit//?heartbeat=10"
    query = "?ssl_ca_certs=ca.pem"
    two = broker_address(Settings(broker_url=f"amqps://a//{query};amqps://b//{query}"))
    assert two.url == "amqps://a//;amqps://b//"
    assert two.tls == broker_address(verified).tls
