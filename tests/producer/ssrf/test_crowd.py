"""One server has so many places, whatever the number of its names."""

import asyncio
from ipaddress import ip_address
from typing import Any

import pytest

from blipq.ssrf import http as module
from blipq.ssrf.crowd import Crowd
from blipq.ssrf.http import GuardedHttp
from blipq.ssrf.policy import Policy, Unresolved


def test_an_address_has_so_many_places_and_gets_them_back() -> None:
    crowd, address = Crowd(), ip_address("192.0.2.1")
    with crowd.visit(1) as first, crowd.visit(1) as second:
        assert first.enter(address, 443)
        assert not second.enter(address, 443)
        assert second.enter(address, 8443)
        assert second.enter(ip_address("192.0.2.2"), 443)
    assert len(crowd) == 0
    with crowd.visit(1) as later:
        assert later.enter(address, 443)


def test_a_submitter_has_so_many_places_wherever_they_are() -> None:
    crowd = Crowd()
    with crowd.visit(9) as first, crowd.visit(9) as second, crowd.visit(9) as third:
        assert first.enter_for("one", 2)
        assert first.enter(ip_address("192.0.2.1"), 443)
        assert second.enter_for("one", 2)
        assert not third.enter_for("one", 2)
        assert third.enter_for("another", 2)
    assert len(crowd) == 0


def test_the_addresses_of_one_ipv6_network_are_one() -> None:
    crowd = Crowd()
    with crowd.visit(1) as first, crowd.visit(1) as second:
        assert first.enter(ip_address("2606:4700::1"), 443)
        assert not second.enter(ip_address("2606:4700::ffff:1"), 443)
        assert second.enter(ip_address("2606:4700:0:1::1"), 443)


def test_a_name_whose_servers_are_silent_has_no_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RESOLVE_TIMEOUT_S", 0.05)

    async def silent(host: str, port: int) -> Any:
        await asyncio.sleep(60)

    async def ask() -> None:
        http = GuardedHttp(Policy(), timeout_s=30, resolve=silent)
        async with http.response("GET", "https://tarpit.example/", {}):
            pass

    with pytest.raises(Unresolved, match="not resolved within"):
        asyncio.run(ask())
