"""The user that fronts run as, where that is another one than the worker's."""

import os
import pwd
from dataclasses import dataclass

from blipq.errors import InvalidRequest
from blipq.local.supervisor import Identity

_SETTING = "BLIPQ_FRONT_USER"


@dataclass(frozen=True, slots=True)
class FrontUser:
    """A user of this host. environment: what says so to its processes."""

    name: str
    identity: Identity
    environment: dict[str, str]

    @property
    def gid(self) -> int:
        return self.identity.gid

    @property
    def served(self) -> set[int]:
        """Users whose processes an engine serves: this, and its own: the main process."""
        return {os.geteuid(), self.identity.uid}


def front_user(named: str | None) -> FrontUser | None:
    """The user of a name or number; None for none, and for the one that this process runs as.

    Raises InvalidRequest for one whom nobody knows, and where this process cannot become another.
    """
    if named is None:
        return None
    found = _user(named)
    if found.identity.uid == os.geteuid():
        return None
    if os.geteuid() != 0:
        raise InvalidRequest(
            f"{_SETTING}={named}: only root can run fronts as another user, and this worker "
            f"runs as user {os.geteuid()}"
        )
    return found


def _user(named: str) -> FrontUser:
    try:
        entry = pwd.getpwuid(int(named)) if named.isdecimal() else pwd.getpwnam(named)
    except (KeyError, OverflowError):
        if named.isdecimal() and int(named) < 2**32 - 1:  # -1 means no user at all
            return FrontUser(named, Identity(int(named), int(named), ()), {"HOME": "/"})
        raise InvalidRequest(f"{_SETTING}={named}: there is no such user") from None
    name, gid = entry.pw_name, entry.pw_gid
    identity = Identity(entry.pw_uid, gid, tuple(os.getgrouplist(name, gid)))
    return FrontUser(name, identity, {"HOME": entry.pw_dir, "USER": name, "LOGNAME": name})
