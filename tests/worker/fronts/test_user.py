"""The user that fronts run as."""

import os
import pwd
from collections.abc import Sequence

import pytest

from blipq.errors import InvalidRequest
from blipq.local.supervisor import Identity
from blipq_worker.fronts.user import front_user

NOBODY = pwd.getpwnam("nobody")
#: A number without an entry: nothing is known of it.
NUMBER = 4_000_000_000


@pytest.fixture
def as_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)


@pytest.mark.usefixtures("as_root")
def test_a_user_is_known_by_name_and_by_number() -> None:
    for named in ("nobody", str(NOBODY.pw_uid)):
        user = front_user(named)
        assert user is not None
        assert user.identity[:2] == (NOBODY.pw_uid, NOBODY.pw_gid)
        assert NOBODY.pw_gid in user.identity.groups
        assert user.environment == {"HOME": NOBODY.pw_dir, "USER": "nobody", "LOGNAME": "nobody"}
        assert user.served == {0, NOBODY.pw_uid}


@pytest.mark.usefixtures("as_root")
def test_a_group_that_is_named_is_the_only_one() -> None:
    user = front_user(f"{NOBODY.pw_uid}:4001")
    assert user is not None
    assert user.identity == Identity(NOBODY.pw_uid, 4001, (4001,))
    unknown = front_user(f"{NUMBER}:{NUMBER + 1}")
    assert unknown is not None
    assert unknown.identity == Identity(NUMBER, NUMBER + 1, (NUMBER + 1,))
    assert unknown.environment == {"HOME": "/"}


@pytest.mark.usefixtures("as_root")
def test_a_number_that_nobody_knows_gets_no_group_of_another() -> None:
    with pytest.raises(InvalidRequest, match=f"no such user; or name its group, too: {NUMBER}:GID"):
        front_user(str(NUMBER))


@pytest.mark.usefixtures("as_root")
@pytest.mark.parametrize("named", ["nobody-here", "-1", " ", "nobody:65534", "65534:", "1:2:3"])
def test_nobody_is_taken_for_another(named: str) -> None:
    with pytest.raises(InvalidRequest, match="there is no such user"):
        front_user(named)


@pytest.mark.usefixtures("as_root")
@pytest.mark.parametrize("named", ["4294967295", "9" * 30, "1000:4294967295"])
def test_a_number_that_the_kernel_takes_for_none_is_refused(named: str) -> None:
    with pytest.raises(InvalidRequest, match="numbers of users end before"):
        front_user(named)


@pytest.mark.usefixtures("as_root")
@pytest.mark.parametrize("named", ["root", "0", "0:4000", "4000:0"])
def test_root_and_its_group_are_refused(named: str) -> None:
    with pytest.raises(InvalidRequest, match="is root, or in its group"):
        front_user(named)


@pytest.mark.usefixtures("as_root")
def test_a_member_of_roots_group_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def groups(name: str, gid: int) -> Sequence[int]:
        return [gid, 0]

    monkeypatch.setattr(os, "getgrouplist", groups)
    with pytest.raises(InvalidRequest, match="is root, or in its group"):
        front_user("nobody")


def test_who_cannot_become_another_user_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(InvalidRequest, match="only root can run fronts as another user"):
        front_user("nobody")
    assert front_user(None) is None
