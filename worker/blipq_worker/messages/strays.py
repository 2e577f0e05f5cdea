"""Messages that nobody would read: a foreign client made up the name of a model, for instance.

Python's clients are refused at submit. A client of another language pushes to a list of Celery's,
and one of a model that no worker serves would stay for ever, without a record. One worker at a time
looks through the broker's keys for such lists, a slice a beat, and records each message's job as
failed. A list of a known model is left alone: its jobs wait for a worker. The same worker puts back
what those of earlier versions have left (see ``leftovers``).
"""

import json
import logging
from typing import Any, cast

from blipq.contract import ErrorCode, JobError, Kind
from blipq.errors import UnknownModel
from blipq.ledger import keys
from blipq.ledger.connection import connect, redis_errors
from blipq.ledger.worker import WorkerLedger
from blipq.redis.url import SCHEMES
from blipq.settings import Settings
from blipq_worker.messages.envelope import is_id
from blipq_worker.messages.leftovers import Leftovers
from blipq_worker.process.periodic import Periodic

log = logging.getLogger(__name__)

BEAT_S = 1.0
#: Keys that one beat looks at: about a millisecond of Redis' time.
SLICE = 2000
#: Messages that one beat takes out of a list.
MESSAGES = 100

_KINDS = {keys.task_name(kind): kind for kind in Kind}


class Strays(Periodic):
    """Looks for lists of unknown models, where the broker is a Redis."""

    def __init__(self, ledger: WorkerLedger, settings: Settings, worker: str) -> None:
        super().__init__("blipq-strays", BEAT_S)
        self._ledger = ledger
        self._worker = worker
        self._cursor = 0
        url = settings.effective_broker_url
        is_redis = url.partition("://")[0].lower() in SCHEMES
        # Other brokers do not let their queues be listed.
        self._broker: Any = (
            connect(settings.model_copy(update={"redis_url": url})) if is_redis else None
        )
        self._leftovers = Leftovers(self._broker)

    def tick(self) -> None:
        """Looks at the next keys, if the lock is ours."""
        if self._broker is None or not self._is_ours():
            return
        self._leftovers.put_back()
        with redis_errors():
            found = self._broker.scan(self._cursor, match=keys.BROKER_KEYS, count=SLICE)
        self._cursor, names = found
        for name in names:
            key = keys.broker_key(name)
            if key is not None and (unknown := self._unknown(key.model)) is not None:
                self._clear(name, key.is_binding, unknown)

    def _is_ours(self) -> bool:
        return self._ledger.lock(keys.STRAYS_LOCK, self._worker, 5 * BEAT_S) != "taken"

    def _unknown(self, model: str) -> UnknownModel | None:
        try:
            self._ledger.check_models([model])
        except UnknownModel as error:
            return error
        return None

    def _clear(self, key: str, is_binding: bool, unknown: UnknownModel) -> None:
        """A message leaves the list when its job is on record: a crash in between costs nothing."""
        with redis_errors():
            if is_binding:
                self._broker.unlink(key)
                return
            if self._broker.type(key) != "list":
                return
            for text in cast("list[str]", self._broker.lrange(key, -MESSAGES, -1)):
                if self._is_settled(text, unknown):
                    self._broker.lrem(key, -1, text)

    def _is_settled(self, text: str, unknown: UnknownModel) -> bool:
        """Whether nobody needs the message: its job has ended, or ends here."""
        try:
            headers = json.loads(text)["headers"]
            id, kind = headers["id"], _KINDS[headers["task"]]
        except (ValueError, TypeError, KeyError, RecursionError):
            id, kind = None, None
        if kind is None or not is_id(id):
            log.error("a message for an unknown model, which is none of ours, was dropped")
            return True
        error = JobError(code=ErrorCode.INVALID_REQUEST, message=str(unknown)[:2000])
        if self._ledger.refuse(id, kind, error.model_dump_json(), model=unknown.model):
            log.warning("%s: refused: %s", id, unknown)
            return True
        # A client whose settings declare the model recorded it: it may wait until its deadline.
        info = self._ledger.read(id)
        return info is None or info.ended
