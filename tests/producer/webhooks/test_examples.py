"""The receivers in examples/ verify what is sent: Python's and npm's `standardwebhooks`."""

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from blipq.local.stack import free_port
from blipq.local.supervisor import Service
from blipq.webhooks.delivery import new_secret
from conftest import ROOT, blipq, wait_until
from receivers import SECRET, receiving

EXAMPLES = ROOT / "examples" / "webhooks"


@pytest.fixture(scope="session")
def node_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Node.js example beside npm's library."""
    if shutil.which("npm") is None:
        assert "CI" not in os.environ, "CI needs Node.js and npm"
        pytest.skip("Node.js is not installed here")
    folder = tmp_path_factory.mktemp("node")
    shutil.copy(EXAMPLES / "receiver.mjs", folder)
    command = ["npm", "install", "--no-audit", "--no-fund", "--silent", "standardwebhooks@1"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=100)
    return folder


@pytest.fixture(params=["python", "node"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """An example that runs."""
    port = free_port()
    if request.param == "node":
        script = request.getfixturevalue("node_folder") / "receiver.mjs"
        command = ["node", str(script), str(port)]
    else:
        command = [sys.executable, str(EXAMPLES / "receiver.py"), str(port)]
    environment = {"WEBHOOK_SECRET": SECRET}
    service = Service("receiver", command, env=environment, log=tmp_path / "receiver.log")
    service.start()
    url = f"http://127.0.0.1:{port}/"
    try:
        wait_until(lambda: _answers(port), "the receiver")
        yield url
    finally:
        service.stop()


def _answers(port: int) -> bool:
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


@pytest.fixture
def deliver(url: str) -> Callable[..., tuple[int, str]]:
    def deliver(secret: str) -> tuple[int, str]:
        settings = {"BLIPQ_WEBHOOK_ALLOW": "127.0.0.1", "BLIPQ_WEBHOOK_SECRETS": secret}
        ran = blipq("webhooks", "test", url, **settings)
        return ran.returncode, ran.stdout

    return deliver


def test_the_example_takes_what_is_signed_and_refuses_another_secret(
    deliver: Callable[..., tuple[int, str]],
) -> None:
    assert deliver(SECRET) == (0, "delivered: HTTP 204\n")
    assert deliver(f"{new_secret()},{SECRET}") == (0, "delivered: HTTP 204\n")
    assert deliver(new_secret()) == (1, "refused: HTTP 401\n")


VERIFY = """
import { readFileSync } from "node:fs";
import { Webhook } from "standardwebhooks";
const { secret, body, headers } = JSON.parse(readFileSync(0, "utf8"));
const told = (secret, body, headers) => {
  try { new Webhook(secret).verify(body, headers); return "verified"; }
  catch (error) { return error.message; }
};
const old = { ...headers, "webhook-timestamp": String(Number(headers["webhook-timestamp"]) - 600) };
const other = "whsec_" + Buffer.alloc(32, 7).toString("base64");
console.log(told(secret, body, headers));
console.log(told(secret, body.replace("test", "tesT"), headers));
console.log(told(secret, body, old));
console.log(told(other, body, headers));
"""


def test_the_npm_library_verifies_a_delivery_and_refuses_what_was_changed(
    node_folder: Path,
) -> None:
    with receiving() as receiver:
        settings = {"BLIPQ_WEBHOOK_ALLOW": "127.0.0.1", "BLIPQ_WEBHOOK_SECRETS": SECRET}
        assert blipq("webhooks", "test", receiver.url, **settings).returncode == 0
    (got,) = receiver.got
    script = node_folder / "verify.mjs"
    script.write_text(VERIFY)
    told = {"secret": SECRET, "body": got.body.decode(), "headers": got.headers}
    ran = subprocess.run(
        ["node", str(script)], input=json.dumps(told), capture_output=True, text=True, timeout=30
    )
    lines = ran.stdout.splitlines()
    assert lines[0] == "verified", ran
    assert len(lines) == 4
    assert "verified" not in lines[1:]
