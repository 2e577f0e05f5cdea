"""Doors with a console, jobs of all kinds with hostile texts, and pages taken apart."""

import base64
import json
import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path
from typing import Any

import httpx2
import pytest

from api.conftest import DoorProcess, beside, running, service_of
from blipq import Client, Settings
from blipq.contract import ErrorCode, JobError
from blipq.ledger.worker import Claim, WorkerLedger
from blipq.local.stack import LocalStack
from conftest import blipq

KEYS = {
    "operator": ("--scope", "admin", "--scope", "read", "--scope", "submit", "--scope", "cancel"),
    "reader": ("--tenant", "shop", "--scope", "read"),
    "shop": ("--bucket", "photos/shop"),
    "other": ("--bucket", "*"),
}
PAGES = (
    "",
    "jobs",
    "runs",
    "queues",
    "workers",
    "dead",
    "webhooks",
    "webhooks?dead=false",
    "log",
    "try",
)
#: Runs wherever a text becomes markup, leaves an attribute, or becomes script.
HOSTILE = "</script><img src=x onerror=hit()>\"'><svg onload=hit()>{{7*7}}${hit()}\u202e"
#: The templates of pages, by name.
TEMPLATES = {
    each.name: each.read_text()
    for folder in (
        resources.files("blipq_api.console") / "page",
        resources.files("blipq.pages") / "shared",
    )
    for each in folder.iterdir()
    if each.name.endswith(".html")
}
#: Attributes whose values do something, with these.
HX = re.compile(
    r"""(?<![\w-])((?:data-)?hx-[\w:-]+|on\w+|style)\s*=\s*("[^"]*"|'[^']*'|[^\s>]*)""",
    re.IGNORECASE,
)


@dataclass
class Keyed:
    """A door with keys, and the keys by their names."""

    door: DoorProcess
    keys: dict[str, str]
    file: Path

    @property
    def url(self) -> str:
        return self.door.url

    @contextmanager
    def signed_in(self, name: str = "operator") -> Iterator[httpx2.Client]:
        """A browser without scripts, in a session of a key."""
        with self.door.http() as http:
            answer = http.post("/console/login", data={"key": self.keys[name]})
            assert (answer.status_code, answer.headers["location"]) == (303, "."), answer.text
            yield http


@pytest.fixture(scope="module")
def keyed_door(stack: LocalStack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Keyed]:
    folder = tmp_path_factory.mktemp("console")
    file, keys = folder / "keys.toml", {}
    for name, options in KEYS.items():
        everything = ("--model", "*", "--index", "*") if name != "shop" else ()
        buckets = ("--bucket", "*") if name == "operator" else ()
        ran = blipq(
            "api", "keys", "new", name, "--file", str(file), *options, *everything, *buckets
        )
        assert ran.returncode == 0, ran.stderr
        keys[name] = ran.stdout.strip()
    options = {"api_keys": str(file), "api_trusted_proxies": "127.0.0.1"}
    service = service_of(stack, beside(stack), folder / "door.log", options=options)
    yield Keyed(running(service), keys, file)
    service.stop(timeout=30)


@pytest.fixture
def keyed(keyed_door: Keyed, apart: Settings) -> Keyed:
    """A door with keys, on a database that is empty."""
    return keyed_door


@pytest.fixture
def operator(keyed: Keyed) -> Iterator[httpx2.Client]:
    with keyed.signed_in() as http:
        yield http


def claimed(ledger: WorkerLedger, id: str) -> Claim:
    claim = ledger.claim(id, HOSTILE)
    assert isinstance(claim, Claim)
    return claim


def succeed(ledger: WorkerLedger, id: str, result: dict[str, Any]) -> None:
    receipt = {"worker": HOSTILE, "note": HOSTILE, "checkpoint": HOSTILE, "queue_ms": 3.0}
    assert ledger.succeed(claimed(ledger, id), json.dumps(result), json.dumps(receipt))


def explained(text: str, *words: str) -> dict[str, Any]:
    """A score with maps of 2 x 3: of the text, which grow to the right, and of its words."""
    maps = [each for _ in range(1 + len(words)) for each in (0, 0.5, 1, 0, 0.5, 1)]
    data = base64.b64encode(struct.pack(f"<{len(maps)}e", *maps)).decode()
    map_ = {"shape": [1 + len(words), 2, 3], "dtype": "float16", "data": data}
    return {"text": text, "score": 0.4, "map": map_, "words": words}


@pytest.fixture
def hostile(client: Client, ledger: WorkerLedger) -> list[str]:
    """Jobs in all states, whose every text is hostile; their ids."""
    texts: dict[str, Any] = {"metadata": {HOSTILE[:64]: HOSTILE}}
    image = f"s3://photos/{HOSTILE}"
    webhook = {"url": "https://example.org/" + "%3Cscript%3E<script>hit()</script>\"'><img>"}
    caption = client.caption(image, prompt=HOSTILE, webhook=webhook, **texts)
    vqa = client.vqa(image, HOSTILE, **texts)
    match = client.match(image, [HOSTILE, "a cat"], **texts)
    embed = client.embed(image, index={"name": "photos", "id": HOSTILE}, **texts)
    search = client.search("photos", HOSTILE, **texts)
    dead = client.caption(image, **texts)
    waiting = client.vqa(image, HOSTILE, model="nobody", **texts)
    results: dict[str, dict[str, Any]] = {
        caption.id: {"kind": "caption", "captions": [{"text": HOSTILE, "score": 0.5}]},
        vqa.id: {
            "kind": "vqa",
            "answers": [
                {
                    "question": HOSTILE,
                    "text": HOSTILE,
                    "choices": [{"text": HOSTILE, "probability": 0.7}],
                }
            ],
        },
        match.id: {"kind": "match", "head": "itm", "scores": [explained(HOSTILE, HOSTILE)]},
        embed.id: {"kind": "embed", "arrays": {}, "indexed": HOSTILE},
        search.id: {
            "kind": "search",
            "hits": [{"id": HOSTILE, "itc": 0.5, "uri": image, "metadata": {"a": HOSTILE}}],
        },
    }
    for id, result in results.items():
        succeed(ledger, id, result)
    error = JobError(code=ErrorCode.IMAGE_UNAVAILABLE, message=HOSTILE, retryable=True)
    assert ledger.fail(claimed(ledger, dead.id), error.model_dump_json(), "{}", dead=True)
    told = {"models": ["default", HOSTILE], "threads": 4, "active": 1, "started_at": 1.0}
    ledger.register(HOSTILE, ["default"], json.dumps(told), ttl_s=60, spare=False)
    return [*results, dead.id, waiting.id]


@dataclass
class Markup(HTMLParser):
    """A page's elements with their attributes."""

    text: str
    elements: list[tuple[str, dict[str, str]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.feed(self.text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def values(self, *names: str) -> list[str]:
        """The values of all attributes with one of these names."""
        return [given[name] for _, given in self.elements for name in names if name in given]

    def fields(self, action: str) -> dict[str, str]:
        """The hidden fields of the first form with a button for this action."""
        forms = re.findall(r"<form.*?</form>", self.text, re.S)
        form = next(Markup(each) for each in forms if f'value="{action}"' in each)
        return {
            given["name"]: given.get("value", "") for tag, given in form.elements if tag == "input"
        }


def page(http: httpx2.Client, path: str, status: int = 200) -> Markup:
    """A page of the console."""
    answer = http.get(f"/console/{path}")
    assert answer.status_code == status, answer.text[:2000]
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    return Markup(answer.text)
