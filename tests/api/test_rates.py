"""Sign-ins and wrong keys: how many, from where, and what is answered then."""

from types import SimpleNamespace

import pytest

from blipq_api.access import rates
from blipq_api.access.rates import (
    ALL_WRONG_AT_ONCE,
    MOST_ADDRESSES,
    SIGN_INS_AT_ONCE,
    WRONG_AT_ONCE,
    SignIns,
    WrongKeys,
)
from blipq_api.problems import Problem


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr(rates, "time", SimpleNamespace(monotonic=lambda: now[0]))
    return now


def is_refused(sign_ins: SignIns, address: str) -> bool:
    try:
        sign_ins.check(address)
    except Problem as problem:
        return (problem.status, problem.code) == (429, "too_many_sign_ins")
    return False


def test_an_address_has_so_many_wrong_keys_and_gets_one_back_with_time(clock: list[float]) -> None:
    sign_ins = SignIns()
    for _ in range(WRONG_AT_ONCE):
        assert not is_refused(sign_ins, "203.0.113.9")
        sign_ins.wrong("203.0.113.9")
    assert is_refused(sign_ins, "203.0.113.9")
    assert not is_refused(sign_ins, "203.0.113.8")
    clock[0] += 1.01 / rates.WRONG_PER_S
    assert not is_refused(sign_ins, "203.0.113.9")
    sign_ins.wrong("203.0.113.9")
    assert is_refused(sign_ins, "203.0.113.9")


def test_the_addresses_of_one_ipv6_network_count_together(clock: list[float]) -> None:
    sign_ins = SignIns()
    for n in range(WRONG_AT_ONCE):
        sign_ins.wrong(f"2001:db8::{n:x}")
    assert is_refused(sign_ins, "2001:db8::ffff")
    assert not is_refused(sign_ins, "2001:db8:0:1::1")


def test_all_addresses_together_have_a_limit_and_few_are_kept(clock: list[float]) -> None:
    sign_ins = SignIns()
    for n in range(ALL_WRONG_AT_ONCE):
        sign_ins.wrong(f"10.0.{n // 256}.{n % 256}")
    assert is_refused(sign_ins, "192.0.2.1")
    for n in range(2 * MOST_ADDRESSES):
        sign_ins.wrong(f"10.{n // 65536}.{n // 256 % 256}.{n % 256}")
    assert len(sign_ins._of) == MOST_ADDRESSES
    clock[0] += 1.01 / rates.ALL_WRONG_PER_S
    assert not is_refused(sign_ins, "192.0.2.1")


def test_wrong_keys_of_one_address_use_up_nobody_elses(clock: list[float]) -> None:
    sign_ins = SignIns()
    for _ in range(2 * ALL_WRONG_AT_ONCE):
        sign_ins.wrong("203.0.113.9")
    assert is_refused(sign_ins, "203.0.113.9")
    assert not is_refused(sign_ins, "203.0.113.8")


def test_a_key_signs_in_so_often_and_each_key_for_itself(clock: list[float]) -> None:
    sign_ins = SignIns()

    def refused(name: str) -> bool:
        try:
            sign_ins.right(name)
        except Problem as problem:
            return (problem.status, problem.code) == (429, "too_many_sign_ins")
        return False

    assert [refused("shop") for _ in range(SIGN_INS_AT_ONCE)] == [False] * SIGN_INS_AT_ONCE
    assert refused("shop")
    assert not refused("other")
    clock[0] += 1.01 / rates.SIGN_INS_PER_S
    assert not refused("shop")
    assert refused("shop")


def test_a_wrong_key_is_told_of_only_after_those_at_once(clock: list[float]) -> None:
    wrong = WrongKeys()
    assert [wrong.wrong("203.0.113.9") for _ in range(WRONG_AT_ONCE)] == [0.0] * WRONG_AT_ONCE
    assert wrong.wrong("203.0.113.9") == pytest.approx(1 / rates.WRONG_PER_S)
    assert wrong.wrong("203.0.113.8") == 0
