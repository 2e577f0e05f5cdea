"""A sender in this process, its receivers on loopback, and jobs that are worked by hand."""

import asyncio
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest

from blipq import Client, Settings
from blipq.ledger.worker import Claim, WorkerLedger
from blipq.ssrf.http import GuardedHttp
from blipq.webhooks.outbox import Outbox
from blipq.webhooks.sender import Sender, Together
from receivers import SECRET, Receiver, receiving

CAPTION = {"kind": "caption", "captions": [{"text": "a red circle"}]}


@pytest.fixture
def hooked(apart: Settings) -> Settings:
    """Settings of producers and senders: loopback is allowed, and retries come at once."""
    return Settings.model_validate(
        {
            **apart.model_dump(),
            "webhook_secrets": SECRET,
            "webhook_allow": "127.0.0.1",
            "webhook_ladder": "0,0.05,0.05,0.05",
            "webhook_timeout_s": 2,
        }
    )


@pytest.fixture
def client(hooked: Settings) -> Iterator[Client]:
    with Client(hooked) as client:
        yield client


@pytest.fixture
def outbox(raw_redis: Any, hooked: Settings) -> Outbox:
    return Outbox(raw_redis, hooked)


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as receiver:
        yield receiver


@contextmanager
def sending(
    settings: Settings,
    http: GuardedHttp | None = None,
    *,
    beside: Sequence[Settings] = (),
    together: Together | None = None,
) -> Iterator[Sender]:
    """A sender on a thread, and others of the same process; they drain at the end."""
    loop, stop = asyncio.new_event_loop(), asyncio.Event()
    together = together or Together(several=bool(beside))
    senders = [Sender(each, http=http, together=together) for each in (settings, *beside)]

    async def run() -> None:
        async with asyncio.TaskGroup() as tasks:
            for sender in senders:
                tasks.create_task(sender.run(stop))

    thread = threading.Thread(target=loop.run_until_complete, args=(run(),))
    thread.start()
    try:
        yield senders[0]
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(30)
        assert not thread.is_alive()
        loop.close()


End = Callable[..., str]


@pytest.fixture
def end(client: Client, ledger: WorkerLedger) -> End:
    """Submits a job and ends it; its id."""

    def end(url: str, result: dict[str, Any] = CAPTION, events: Any = None, **options: Any) -> str:
        webhook = {"url": url} | ({"events": events} if events else {})
        job = client.caption("s3://uploads/cat.jpg", webhook=webhook, **options)
        claim = ledger.claim(job.id, "w1")
        assert isinstance(claim, Claim)
        assert ledger.succeed(claim, json.dumps(result), "{}")
        return job.id

    return end
