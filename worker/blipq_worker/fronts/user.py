"""The user that fronts run as, where root runs their worker."""

import os
import pwd
import re
from dataclasses import dataclass

from blipq.errors import InvalidRequest
from blipq.local.supervisor import Identity

SETTING = "BLIPQ_FRONT_USER"
#: What no user and no group has for a number: to the kernel it means "leave it".
_NOBODY = 2**32 - 1


@dataclass(frozen=True, slots=True)
class FrontUser:
    """A user that is not root. environment: what a process has of it in its environment."""

    named: str
    identity: Identity
    environment: dict[str, str]

    @property
    def gid(self) -> int:
        """The group that fronts share files with the main process by."""
        return self.identity.gid

    @property
    def served(self) -> set[int]:
        """Users whose processes an engine serves: this one, and its own."""
        return {os.geteuid(), self.identity.uid}


def front_user(named: str | None) -> FrontUser | None:
    """The user of ``name`` or ``uid[:gid]``; None for None.

    Raises InvalidRequest where there is no such user, where it has rights of root, and where this
    process cannot become another.
    """
    if named is None:
        return None
    if os.geteuid() != 0:
        raise InvalidRequest(
            f"{SETTING}={named}: only root can run fronts as another user, and this worker runs "
            f"as user {os.geteuid()}"
        )
    user = _found(named)
    uid, gid, groups = user.identity
    if 0 in (uid, gid, *groups):
        raise InvalidRequest(f"{SETTING}={named}: this user is root, or in its group")
    return user


def _found(named: str) -> FrontUser:
    numbers = re.fullmatch(r"([0-9]+)(?::([0-9]+))?", named)
    if numbers is None:
        entry = _entry(named)
    else:
        uid, gid = (None if each is None else int(each) for each in numbers.groups())
        assert uid is not None
        if max(uid, gid or 0) >= _NOBODY:
            raise InvalidRequest(f"{SETTING}={named}: numbers of users end before {_NOBODY}")
        entry = _entry(uid)
        if gid is not None:
            # Nothing of the group that the user has otherwise.
            return FrontUser(named, Identity(uid, gid, (gid,)), _environment(entry))
    if entry is None:
        # The group of the same number may be one with rights, such as adm or docker.
        hint = f"; or name its group, too: {named}:GID" if numbers else ""
        raise InvalidRequest(f"{SETTING}={named}: there is no such user{hint}")
    try:
        groups = tuple(os.getgrouplist(entry.pw_name, entry.pw_gid))
    except OSError as error:
        raise InvalidRequest(f"{SETTING}={named}: {error}") from error
    identity = Identity(entry.pw_uid, entry.pw_gid, groups)
    return FrontUser(named, identity, _environment(entry))


def _entry(user: str | int) -> pwd.struct_passwd | None:
    try:
        return pwd.getpwuid(user) if isinstance(user, int) else pwd.getpwnam(user)
    except KeyError:
        return None
    except (OSError, ValueError) as error:
        raise InvalidRequest(f"{SETTING}={user}: {error}") from error


def _environment(entry: pwd.struct_passwd | None) -> dict[str, str]:
    if entry is None:
        return {"HOME": "/"}
    return {"HOME": entry.pw_dir, "USER": entry.pw_name, "LOGNAME": entry.pw_name}
