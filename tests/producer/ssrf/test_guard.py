"""Which URLs are met: hostile ones never connect, neither by their text nor by their addresses.

Here on the way of a webhook; ``worker/images/test_https.py`` takes images along the same URLs.
"""

import asyncio
import ipaddress
import socket
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from blipq import Client, InvalidRequest, Settings, Webhook
from blipq.ssrf.http import MOST_LOOK_UPS, GuardedHttp
from blipq.ssrf.policy import Forbidden, Policy, is_public, parse
from blipq.webhooks import response as webhooks
from blipq.webhooks.response import MAX_ANSWER_BYTES, Answer
from hostile import HOSTILE_TEXTS, INSIDE, Names, self_signed
from receivers import Receiver, receiving


def post(http: GuardedHttp, *urls: str) -> list[Answer]:
    async def all_() -> list[Answer]:
        return [await webhooks.post(http, url, {"webhook-id": "msg_1"}, b"{}") for url in urls]

    try:
        return asyncio.run(all_())
    finally:
        http.close()


@pytest.mark.parametrize("url", HOSTILE_TEXTS)
def test_a_hostile_text_is_refused_at_submit_and_never_connects(
    url: str, connects: list[Any]
) -> None:
    client = Client(redis_url="redis://127.0.0.1:1")
    with client, pytest.raises(InvalidRequest, match=r"webhook\.url"):
        client.caption("s3://bucket/key", webhook={"url": url})
    http = GuardedHttp(Policy(), timeout_s=1, resolve=Names(["127.0.0.1"]))
    assert [answer.outcome for answer in post(http, url)] == ["url_forbidden"]
    assert connects == []


@pytest.mark.parametrize("host", INSIDE)
def test_an_address_inside_never_connects_however_it_is_written_or_named(
    host: str, connects: list[Any]
) -> None:
    named = GuardedHttp(Policy(), timeout_s=1, resolve=Names([host.strip("[]")]))
    beside = GuardedHttp(Policy(), timeout_s=1, resolve=Names(["8.8.8.8", host.strip("[]")]))
    for http, url in (
        (named, f"https://{host}/"),
        (named, "https://example.org/"),
        (beside, "https://example.org/"),
    ):
        (answer,) = post(http, url)
        assert answer.outcome == "url_forbidden", answer
    assert connects == []


def test_names_that_turn_inside_after_they_were_checked_never_connect_there(
    connects: list[Any],
) -> None:
    """DNS answers a public address first and 127.0.0.1 from then on."""
    names = Names(["93.184.216.34"], ["127.0.0.1"])
    http = GuardedHttp(Policy(), timeout_s=1, resolve=names)
    first, second = post(http, "https://rebinds.example/", "https://rebinds.example/")
    assert (first.outcome, second.outcome) == ("unreachable", "url_forbidden")
    assert connects == [("93.184.216.34", 443)]
    assert names.asked == 2


def test_public_addresses_are_public_however_they_are_wrapped() -> None:
    for text in (
        "8.8.8.8",
        "2606:4700::1",
        "::ffff:8.8.8.8",
        "64:ff9b::8.8.8.8",
        "2002:808:808::1",
    ):
        assert is_public(ipaddress.ip_address(text)), text


@pytest.mark.parametrize("kind", [ipaddress.IPv4Address, ipaddress.IPv6Address])
def test_what_is_public_does_not_depend_on_the_tables_of_this_python(
    monkeypatch: pytest.MonkeyPatch, kind: type
) -> None:
    """They differ: 192.0.0.8 and 6to4, say, are global for some releases and not for others."""

    def differs(address: Any) -> bool:
        raise AssertionError(f"asked Python about {address}")

    for name in ("is_global", "is_private", "is_reserved", "is_multicast", "is_link_local"):
        monkeypatch.setattr(kind, name, property(differs))
    for host in INSIDE:
        assert not is_public(ipaddress.ip_address(host.strip("[]"))), host
    assert is_public(ipaddress.ip_address("8.8.8.8"))
    assert is_public(ipaddress.ip_address("2002:808:808::1"))


def test_the_edges_of_the_networks_inside() -> None:
    for inside, outside in (
        ("0.255.255.255", "1.0.0.0"),
        ("10.255.255.255", "11.0.0.0"),
        ("100.127.255.255", "100.128.0.0"),
        ("168.63.129.16", "168.63.129.17"),
        ("172.31.255.255", "172.32.0.0"),
        ("192.0.0.255", "192.0.1.0"),
        ("192.31.196.1", "192.31.197.0"),
        ("192.52.193.1", "192.52.194.0"),
        ("192.88.99.255", "192.88.100.0"),
        ("192.175.48.1", "192.175.49.0"),
        ("198.19.255.255", "198.20.0.0"),
        ("224.0.0.0", "223.255.255.255"),
        ("1fff:ffff::1", "2000::1"),
        ("2001:1ff:ffff::1", "2001:200::1"),
        ("2620:4f:8000::1", "2620:4f:8001::1"),
        ("3fff:fff:ffff::1", "3ffe::1"),
        ("4000::1", "2606:4700::1"),
    ):
        assert not is_public(ipaddress.ip_address(inside)), inside
        assert is_public(ipaddress.ip_address(outside)), outside


def test_good_urls_are_taken_apart() -> None:
    target = parse("HTTPS://Hooks.Example.ORG.:443?a=b@c")
    assert (target.scheme, target.host, target.port) == ("https", "hooks.example.org", 443)
    assert (target.path, target.authority) == ("/?a=b@c", "hooks.example.org")
    assert parse("http://[2606:4700::1]:8080/x").authority == "[2606:4700::1]:8080"


def test_a_webhook_model_knows_the_syntax_without_any_settings() -> None:
    assert Webhook(url="http://inside:8080/").url
    with pytest.raises(ValueError, match="user name"):
        Webhook(url="https://a@b/")


def test_listed_hosts_may_be_inside_over_http_and_on_any_port() -> None:
    policy = Policy(allow=("hooks.inside", "10.1.0.0/16"), ports=(443, 8443))
    assert policy.check("http://hooks.inside:8080/")
    assert policy.check("http://10.1.2.3/")
    assert policy.check("https://example.org:8443/")
    assert policy.judge("hooks.inside", ["10.9.9.9"])
    assert policy.judge("other.example", ["10.1.2.3"])
    for url in ("http://example.org/", "http://10.2.0.1/", "https://example.org:80/"):
        with pytest.raises(Forbidden):
            policy.check(url)
    with pytest.raises(Forbidden, match=r"10\.2\.0\.1.*BLIPQ_WEBHOOK_ALLOW lists"):
        policy.judge("other.example", ["10.1.2.3", "10.2.0.1"])


# --- real receivers -------------------------------------------------------------------------------


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as receiver:
        yield receiver


LOOPBACK = Policy(allow=("127.0.0.1",))


def test_a_receiver_on_loopback_gets_nothing_unless_it_is_listed(receiver: Receiver) -> None:
    https = receiver.url.replace("http:", "https:")
    refused = GuardedHttp(Policy(ports=(receiver.port,)), timeout_s=1)
    assert post(refused, https)[0].outcome == "url_forbidden"
    assert receiver.connections == 0
    assert post(GuardedHttp(LOOPBACK, timeout_s=2), receiver.url)[0].outcome == "delivered"


def test_a_redirect_inside_is_not_followed(receiver: Receiver) -> None:
    receiver.behave = lambda got: (301, {"location": "http://10.0.0.1/"})
    assert post(GuardedHttp(LOOPBACK, timeout_s=2), receiver.url)[0].outcome == "redirected"
    assert len(receiver.got) == 1


def test_proxies_of_the_environment_are_not_used(
    receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    assert post(GuardedHttp(LOOPBACK, timeout_s=2), receiver.url)[0].outcome == "delivered"


def test_a_slow_drip_ends_at_the_timeout_and_an_endless_answer_at_its_cap() -> None:
    def serve(listener: socket.socket, head: bytes, part: bytes, sent: list[int]) -> None:
        peer, _ = listener.accept()
        with peer:
            peer.recv(65536)
            try:
                peer.sendall(head)
                while not peer.sendall(part):
                    sent.append(len(part))
                    stop.wait(0.05 if len(part) == 1 else 0)
            except OSError:
                pass

    def answered(head: bytes, part: bytes) -> tuple[Answer, int]:
        sent: list[int] = []
        with socket.create_server(("127.0.0.1", 0)) as listener:
            thread = threading.Thread(target=serve, args=(listener, head, part, sent))
            thread.start()
            url = f"http://127.0.0.1:{listener.getsockname()[1]}/"
            (answer,) = post(GuardedHttp(LOOPBACK, timeout_s=0.5), url)
            thread.join(10)
        return answer, sum(sent)

    stop = threading.Event()
    dripped, _ = answered(b"HTTP/1.1 200 OK\r\n", b"x")
    assert dripped.outcome == "timeout"
    endless, size = answered(b"HTTP/1.1 200 OK\r\n\r\n", b"x" * 65536)
    assert endless.outcome == "delivered"
    assert size < 100 * MAX_ANSWER_BYTES  # what the kernel's buffers take, not an endless stream


def test_the_checked_address_is_met_under_the_name_of_the_url(tmp_path: Path) -> None:
    """TLS asks for the name's certificate, and Host is the name, at the address that was judged."""
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    self_signed(certificate, key, "hooks.example")
    seen: list[str] = []
    with receiving() as receiver:
        server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        server.load_cert_chain(certificate, key)
        server.sni_callback = lambda _, name, __: seen.append(name)
        receiver.server.socket = server.wrap_socket(receiver.server.socket, server_side=True)
        policy = Policy(allow=("127.0.0.0/8",), ports=(receiver.port,))

        def http() -> GuardedHttp:
            trust = ssl.create_default_context(cafile=certificate)
            return GuardedHttp(policy, timeout_s=3, resolve=Names(["127.0.0.1"]), tls=trust)

        good = post(http(), f"https://hooks.example:{receiver.port}/x")[0]
        other = post(http(), f"https://other.example:{receiver.port}/x")[0]
        untrusting = GuardedHttp(policy, timeout_s=3, resolve=Names(["127.0.0.1"]))
        unknown = post(untrusting, f"https://hooks.example:{receiver.port}/x")[0]
    assert good.outcome == "delivered", good
    assert receiver.got[0].headers["host"] == f"hooks.example:{receiver.port}"
    assert seen[0] == "hooks.example"
    assert {other.outcome, unknown.outcome} == {"unreachable"}
    assert len(receiver.got) == 1


def test_names_whose_servers_are_silent_hold_up_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their look-ups cannot be ended, and go on when their requests are long given up."""
    over = threading.Event()

    def resolve(host: str, *_: Any, **__: Any) -> list[Any]:
        if host.endswith("silent.example"):
            over.wait(60)
            raise socket.gaierror("timed out")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 443))]

    async def ask(http: GuardedHttp) -> tuple[set[str], str]:
        def answers(round: int) -> Any:
            urls = [f"https://{round}-{n}.silent.example/" for n in range(32)]
            return asyncio.gather(*(webhooks.post(http, url, {}, b"{}") for url in urls))

        silent = {each.outcome for round in range(3) for each in await answers(round)}
        return silent, (await webhooks.post(http, "https://inside.example/", {}, b"{}")).outcome

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    http = GuardedHttp(Policy(), timeout_s=1, at_a_time=32)
    try:
        assert asyncio.run(ask(http)) == ({"timeout"}, "url_forbidden")  # it was looked up
    finally:
        over.set()
        http.close()


def test_a_process_that_gets_no_further_thread_tries_again_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A container may have few: that is no fault of the URL's."""
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if thread.name.startswith("blipq-resolve"):
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    (answer,) = post(GuardedHttp(Policy(), timeout_s=5), "https://example.org/")
    assert (answer.outcome, answer.final) == ("unresolved", False)


def test_a_short_timeout_asks_for_no_more_threads_than_a_container_has() -> None:
    http = GuardedHttp(Policy(), timeout_s=0.1, at_a_time=256)
    assert http._threads._max_workers == MOST_LOOK_UPS
    http.close()


def test_a_name_without_an_address_is_unresolved_and_a_closed_port_unreachable(
    settings: Settings,
) -> None:
    http = GuardedHttp(Policy(allow=("127.0.0.1",)), timeout_s=5)
    nowhere, closed = post(http, "https://nothing.invalid/", "http://127.0.0.1:1/")
    assert (nowhere.outcome, closed.outcome) == ("unresolved", "unreachable")
