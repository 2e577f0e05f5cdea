"""The producer's side of the ledger, for an event loop: the same scripts, awaited."""

from collections.abc import Sequence
from typing import Any, Literal, cast

import redis
import redis.asyncio
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from blipq.contract import JobInfo
from blipq.errors import BlipqError
from blipq.ledger import keys
from blipq.ledger.codec import (
    Looked,
    Prepared,
    Recorded,
    job_of,
    looked,
    prepare,
    submit_arguments,
    submitted,
)
from blipq.ledger.ledger import connection_options, redis_errors, script_text
from blipq.redis.sentinel import async_master_pool
from blipq.redis.url import RedisUrl
from blipq.settings import Settings
from blipq.submission import Submission

#: More calls at the same time wait for one of these, up to the timeout.
MAX_CONNECTIONS = 32


def connect_async(settings: Settings, *, reconnects: bool = True) -> "redis.asyncio.Redis":
    """A Redis client that answers or raises within its timeout: nothing is retried silently.

    ``reconnects``: a command that meets a dropped connection opens it again, once.
    """
    dropped = (redis.ConnectionError,) if reconnects else ()
    options = connection_options(settings.timeout_s) | {
        "max_connections": MAX_CONNECTIONS,
        "timeout": settings.timeout_s,
        "retry": Retry(NoBackoff(), 1, supported_errors=dropped),
    }
    url = RedisUrl.of(settings.redis_url)
    if url.has_sentinels:
        return redis.asyncio.Redis.from_pool(async_master_pool(url, **options))
    return redis.asyncio.Redis.from_pool(url.async_pool(**options))


class AsyncLedger:
    """What clients need of the ledger. Raises QueueUnavailable and QueueFull."""

    def __init__(self, client: "redis.asyncio.Redis", settings: Settings) -> None:
        self.redis = client
        self.settings = settings
        self._scripts: dict[str, Any] = {}

    async def submit(self, job: Prepared) -> Recorded:
        """Records a job once, like ``Ledger.submit``."""
        (answer,) = await self.submit_all([job])
        if isinstance(answer, BlipqError):
            raise answer
        return answer

    def prepare(self, submission: Submission, *, notify: str) -> Prepared:
        """Makes a job ready to be recorded. Raises InvalidRequest for a forbidden URL."""
        return prepare(submission, self.settings, notify=notify)

    async def submit_all(self, jobs: Sequence[Prepared]) -> list[Recorded | BlipqError]:
        """Records jobs, each once and in order, like ``Ledger.submit_all``."""
        with redis_errors(jobs[0].submission.id if len(jobs) == 1 else None):
            answer = await self._run("submit", *submit_arguments(jobs, self.settings))
        return submitted(jobs, answer)

    async def read(self, id: str) -> JobInfo | None:
        """The job, after settling what is due; None for an unknown id."""
        with redis_errors(id):
            return job_of(id, await self._run("read", id))

    async def look(self, ids: Sequence[str], *, notify: str) -> Looked:
        """Which of these jobs have ended, after settling what is due."""
        with redis_errors(ids[0] if len(ids) == 1 else None):
            return looked(await self._run("look", keys.ended_channel(notify), *ids))

    async def cancel(self, id: str) -> Literal["cancelled", "ended", "unknown"]:
        """Cancels a job at once, wherever it is."""
        with redis_errors(id):
            answer = await self._run("cancel", id)
        return cast("Literal['cancelled', 'ended', 'unknown']", answer)

    async def aclose(self) -> None:
        """Closes the connections."""
        await self.redis.aclose(close_connection_pool=True)

    async def _run(self, script: str, *args: str | int | float) -> Any:
        if script not in self._scripts:
            self._scripts[script] = self.redis.register_script(script_text(script))
        return await self._scripts[script](args=args)
