"""An operator's client of the ledger: dead letters, queues to empty, live workers."""

import json
from collections.abc import Sequence
from typing import Any, cast

from blipq.contract import JobInfo, Kind
from blipq.ledger import codec, keys
from blipq.ledger.codec import Message
from blipq.ledger.connection import redis_errors
from blipq.ledger.script_runner import ScriptRunner


class OperatorLedger(ScriptRunner):
    """Dead letters are jobs that are out of attempts. Raises QueueUnavailable."""

    def read(self, id: str) -> JobInfo | None:
        """A job as it is now; None for an unknown id."""
        with redis_errors(id):
            return codec.job_of(id, self._run("read", id))

    def dead_letters(self, limit: int = 100) -> list[JobInfo]:
        """The newest dead letters."""
        with redis_errors():
            ids = cast("list[str]", self.redis.zrevrange(keys.DEAD_LETTERS, 0, limit - 1))
        found = (self.read(id) for id in ids)
        return [info for info in found if info is not None]

    def retry_dead_letter(self, id: str) -> Message | None:
        """Queues a dead letter again, alone, with fresh attempts; the message to publish.

        None if the id is not one of a dead letter.
        """
        expires_in = codec.ms(self.settings.default_expires_in)
        with redis_errors(id):
            if not self._run("revive", id, expires_in, codec.retention_ms(self.settings)):
                return None
            kind, queue = cast("list[str]", self.redis.hmget(keys.job(id), "kind", "queue"))
        return Message(Kind(kind), id, queue)

    def drop_dead_letter(self, id: str) -> bool:
        """Deletes a dead letter and its job; False if the id is not one of a dead letter."""
        with redis_errors(id):
            if not self.redis.zrem(keys.DEAD_LETTERS, id):
                return False
            self.redis.delete(keys.job(id))
        return True

    def purge(self, queue: str, ids: Sequence[str]) -> int:
        """Cancels those of these jobs that still wait in the queue; returns how many."""
        with redis_errors():
            return int(self._run("purge", queue, *ids))

    def workers(self) -> dict[str, dict[str, Any]]:
        """The live workers by name, with what each reports of itself."""
        with redis_errors():
            found = list(self.redis.scan_iter(keys.worker("*"), count=1000))
            texts = cast("list[str | None]", self.redis.mget(found)) if found else []
        return {
            key.removeprefix(keys.worker("")): json.loads(text)
            for key, text in zip(found, texts, strict=True)
            if text is not None
        }
