"""Who may do what: the file of keys, which holds their digests alone."""

import hashlib
import json
import logging
import secrets
import time
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from blipq.contract import ImageRef, Name, Options, Request
from blipq.errors import InvalidRequest
from blipq.files import whole_file
from blipq.rights import ANY, Named, Refusal, Rights
from blipq.submission import Submission, explain
from blipq_api.problems import Problem

log = logging.getLogger(__name__)

Scope = Literal["submit", "read", "cancel", "admin"]
ALL_SCOPES: tuple[Scope, ...] = ("submit", "read", "cancel", "admin")
#: The lists of what a key's jobs may name.
LISTS = tuple(Rights.model_fields)
#: Name and tenant of the key that a local stack and the compose file make.
FIRST = "admin"
#: How often the file is looked at, at the most.
CHECK_EVERY_S = 1.0


class Key(Rights):
    """A key's entry in the file: whose it is, and what its jobs may name.

    What is in the tenant's own part of the inbox may always be read.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    tenant: Name
    scopes: tuple[Scope, ...] = ("submit", "read", "cancel")
    rate: Annotated[float, Field(gt=0)] | None = None


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid")

    keys: dict[Name, Key] = Field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Caller:
    """Whoever sends a request: a key, or on loopback without keys this machine's user."""

    name: str
    tenant: str | None
    scopes: Sequence[Scope]
    key: Key | None = None

    def require(self, scope: Scope) -> None:
        """Raises Problem unless the key has the scope."""
        if scope not in self.scopes:
            raise Problem(403, "forbidden", f"the key {self.name!r} lacks the scope {scope!r}")

    def sees(self, tenant: str | None) -> bool:
        """Whether a job of this tenant exists for the caller."""
        return self.tenant is None or tenant == self.tenant or "admin" in self.scopes

    @property
    def only_tenant(self) -> str | None:
        """The tenant whose jobs alone exist for the caller; None if all do."""
        return None if "admin" in self.scopes else self.tenant

    @property
    def folder(self) -> str:
        """The caller's part of the inbox: "", or the tenant and a slash."""
        return "" if self.tenant is None else f"{self.tenant}/"

    def submission(self, request: Request, options: Options, id: str, inbox: str) -> Submission:
        """A job of the caller's. ``inbox``: the name of its bucket.

        Raises Problem for what the key does not allow.
        """
        if self.key is None:
            return Submission(request, options, id, self.tenant)
        webhook = "" if options.webhook is None else options.webhook.url
        named = Named(options.model, options.output or "", webhook)
        rights = self.key.with_folder(f"{inbox}/{self.folder}")
        self._raise(rights.refusal(request, named))
        return Submission(request, options, id, self.tenant, rights.text)

    def check_read(self, what: ImageRef, field: str, inbox: str) -> None:
        """Raises Problem for what the key may not read."""
        if self.key is not None:
            rights = self.key.with_folder(f"{inbox}/{self.folder}")
            self._raise(rights.of_image(what, field))

    def _raise(self, refusal: Refusal | None) -> None:
        if refusal is not None:
            raise Problem(403, "forbidden", f"{refusal} of the key {self.name!r}")


#: The caller of a door without keys.
LOCAL = Caller("local", None, ALL_SCOPES)


class Keyring:
    """The keys of a file, which is read again when it changes. Raises InvalidRequest at first."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._checked_at = time.monotonic()
        self._stamp = _stamp(path)
        self._callers = _callers(path)

    def find(self, secret: str) -> Caller | None:
        """Whose key it is. A digest is looked up, so the time reveals nothing of the key."""
        return self.of_digest(digest(secret))

    def of_digest(self, digest: str) -> Caller | None:
        """Whose key has this digest, as the file is now."""
        self._refresh()
        return self._callers.get(digest)

    def _refresh(self) -> None:
        """What cannot be read changes nothing: an edit that went wrong must lock nobody out."""
        now = time.monotonic()
        if now < self._checked_at + CHECK_EVERY_S:
            return
        self._checked_at = now
        try:
            stamp = _stamp(self._path)
            if stamp != self._stamp:
                self._callers, self._stamp = _callers(self._path), stamp
                log.info("%s: %d keys", self._path, len(self._callers))
        except InvalidRequest as error:
            log.error("the keys stay as they are: %s", error)


def _stamp(path: Path) -> tuple[int, int, int]:
    try:
        found = path.stat()
    except OSError as error:
        raise InvalidRequest(f"BLIPQ_API_KEYS: cannot read {path}: {error.strerror}") from None
    return found.st_mtime_ns, found.st_size, found.st_ino


def _callers(path: Path) -> dict[str, Caller]:
    """The callers by the digests of their keys. Raises InvalidRequest."""
    return {
        key.sha256: Caller(name, key.tenant, key.scopes, key)
        for name, key in read_keys(path).items()
    }


def read_keys(path: Path) -> dict[str, Key]:
    """The entries of a file by name. Raises InvalidRequest, which repeats no digest."""
    try:
        tables: Any = tomllib.loads(path.read_text())
        return TypeAdapter(_File).validate_python(tables).keys
    except OSError as error:
        raise InvalidRequest(f"BLIPQ_API_KEYS: cannot read {path}: {error.strerror}") from None
    except ValidationError as error:
        raise InvalidRequest(f"{path}: {explain(error, _File)}") from None
    except ValueError as error:
        raise InvalidRequest(f"{path} is no TOML: {error}") from None


def digest(secret: str) -> str:
    """What the file holds of a key. It has 256 random bits, so that a salt would add nothing."""
    return hashlib.sha256(secret.encode()).hexdigest()


def make_first_key(path: Path) -> Path | None:
    """Makes the file with one key that may do everything; where that key is kept.

    None if the file is there already. The key itself is beside it, for its owner alone to read, and
    is written first: a process that dies in between leaves no digest of a key that nobody has.
    """
    if path.exists():
        return None
    kept = path.with_suffix(".key")
    secret = kept.read_text().strip() if kept.exists() else _new_secret()
    _replace(kept, secret + "\n")
    lists = {name: [ANY] for name in LISTS} | {"scopes": ALL_SCOPES}
    add_key(path, FIRST, FIRST, lists, secret)
    return kept


def _new_secret() -> str:
    return f"blipq_{secrets.token_urlsafe(32)}"


def add_key(
    path: Path,
    name: str,
    tenant: str,
    lists: Mapping[str, Iterable[str]],
    secret: str | None = None,
) -> str:
    """Adds an entry to the file, which is made if need be; the key, which is kept nowhere.

    ``lists``: scopes and what is allowed; an empty one is left to the default. ``secret``: the key,
    if it is not to be a new one. Raises InvalidRequest.
    """
    known = read_keys(path) if path.exists() else {}
    if name in known:
        raise InvalidRequest(f"{path} has a key {name!r} already")
    secret = secret or _new_secret()
    entry: dict[str, Any] = {"sha256": digest(secret), "tenant": tenant}
    entry |= {field: list(values) for field, values in lists.items() if values}
    try:
        TypeAdapter(_File).validate_python({"keys": {name: entry}})
    except ValidationError as error:
        raise InvalidRequest(explain(error, _File)) from None
    lines = [f"[keys.{json.dumps(name)}]", *(f"{f} = {json.dumps(v)}" for f, v in entry.items())]
    before = path.read_text().rstrip("\n") + "\n\n" if path.exists() else ""
    _replace(path, before + "\n".join(lines) + "\n")
    return secret


def _replace(path: Path, text: str) -> None:
    """Writes a file that its owner alone reads, whole or not at all."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path, mode=0o600) as file:
            file.write(text.encode())
    except OSError as error:
        raise InvalidRequest(f"cannot write {path}: {error.strerror}") from None
