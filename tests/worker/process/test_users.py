"""The user that fronts run as."""

import os
import pwd

import pytest

from blipq.errors import InvalidRequest
from blipq.local.supervisor import Identity
from blipq_worker.process import users
from blipq_worker.process.users import front_user


def test_a_user_is_known_by_name_and_by_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    entry = pwd.getpwnam("nobody")
    for named in ("nobody", str(entry.pw_uid)):
        user = front_user(named)
        assert user is not None
        assert user.identity[:2] == (entry.pw_uid, entry.pw_gid)
        assert user.environment == {"HOME": entry.pw_dir, "USER": "nobody", "LOGNAME": "nobody"}
        assert user.served == {0, entry.pw_uid}
    without_name = front_user("4000000000")
    assert without_name is not None
    assert without_name.identity == Identity(4_000_000_000, 4_000_000_000, ())


@pytest.mark.parametrize("named", ["nobody-here", "4294967295", "99999999999999999999", "-1", " "])
def test_nobody_is_taken_for_another(named: str) -> None:
    with pytest.raises(InvalidRequest, match="there is no such user"):
        front_user(named)


def test_who_cannot_become_another_user_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(users.os, "geteuid", lambda: 1000)
    with pytest.raises(InvalidRequest, match="only root can run fronts as another user"):
        front_user("nobody")
    assert front_user(None) is None
    assert front_user("1000") is None, "it is that one"
