"""Measures what a job takes of Redis' memory: ``python -m tools.docs.job_bytes [JOBS]``.

Of a Redis as it comes, and of one that keeps records compactly.
"""

import json
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from typing import cast

import redis

from blipq import CaptionRequest, Settings
from blipq.ledger.connection import COMPACT_FIELD, connect
from blipq.ledger.worker import Claim, WorkerLedger
from blipq.local.stack import free_port, redis_command
from blipq.submission import Submission, new_id
from blipq.transport.broker import Broker

RESULT = json.dumps({"kind": "caption", "captions": [{"text": "a woman on a beach with a dog"}]})
RECEIPT = json.dumps(
    {"queue_ms": 12.5, "fetch_ms": 8.1, "decode_ms": 6.0, "wait_ms": 3.2, "generate_ms": 180.4}
    | {"tokens": 12, "batch_size": 16, "checkpoint": "opt-2.7b", "revision": "0" * 40}
    | {"dtype": "float16", "quantization": "nf4", "worker": "host-1234-abcdef"}
)


def main(count: int) -> None:
    """Prints bytes per job for both."""
    print("as it comes:")
    _on_a_redis(count)
    print(f"with hash-max-listpack-value {COMPACT_FIELD}:")
    _on_a_redis(count, "--hash-max-ziplist-value", str(COMPACT_FIELD))


def _on_a_redis(count: int, *flags: str) -> None:
    """Submits jobs to a Redis of its own, then ends them, and prints bytes per job."""
    port = free_port()
    settings = Settings(redis_url=f"redis://127.0.0.1:{port}/0", max_open_jobs=10 * count)
    with tempfile.TemporaryDirectory() as folder:
        command = [redis_command(), "--port", str(port), "--dir", folder, "--save", "", *flags]
        server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        try:
            with connect(settings, timeout_s=10) as raw:
                _measure(raw, settings, count)
        finally:
            server.terminate()
            server.wait()


def _measure(raw: "redis.Redis", settings: Settings, count: int) -> None:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        with suppress(redis.ConnectionError):
            raw.ping()
            break
    ledger, broker = WorkerLedger(raw, settings), Broker(settings)

    def submit() -> str:
        key = f"2026/11/25/{new_id()}.jpg"  # as long as keys tend to be
        request = CaptionRequest.model_validate({"image": f"s3://photos-of-the-shop/{key}"})
        message = ledger.submit(Submission(request), notify="0" * 16)
        assert not isinstance(message, str)
        assert broker.publish(message)
        return message.id

    ids = [submit()]  # what a first job makes once
    before = _used(raw)
    ids += [submit() for _ in range(count)]
    queued = _used(raw)
    raw.delete("blipq.default.normal")
    for id in ids:
        claim = cast(Claim, ledger.claim(id, "host-1234-abcdef"))
        assert ledger.succeed(claim, RESULT, RECEIPT)
    kept = _used(raw)
    broker.close()
    print(f"{count} jobs: {(queued - before) / count:.0f} bytes each while queued")
    print(f"{count} jobs: {(kept - before) / count:.0f} bytes each once ended, while kept")


def _used(raw: "redis.Redis") -> int:
    return int(raw.info("memory")["used_memory"])


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 10_000)
