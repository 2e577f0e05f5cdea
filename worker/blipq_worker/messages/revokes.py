"""``celery control revoke``, and Flower's buttons: a revoke cancels the job in the ledger.

Celery alone would only drop the job's message, in this process and until its end: the ledger would
have the job wait for ever, or run after a restart.
"""

import logging
from collections.abc import Callable, Iterable
from typing import Any

from celery.signals import task_revoked
from celery.worker import control, state

from blipq.contract import Kind
from blipq_worker.messages.envelope import KINDS, PARAMETERS

log = logging.getLogger(__name__)

_celery_revoke = control.revoke  # type: ignore[attr-defined]


#: Gets kind, id, request and options of a job, as its message holds them.
Dropped = Callable[[Kind, str, Any, Any], bool]
Expired = Callable[[Kind, str, Any, Any], None]


def follow_revokes(cancel: Callable[[str], bool], dropped: Dropped, expired: Expired) -> None:
    """Makes every revoke a cancel.

    ``cancel`` is called with each id as it is revoked, ``dropped`` with what a message held that
    was dropped for it: its job may have another id, or not be recorded yet. Both answer whether
    the ledger knew the job: only an id that it did not is left to Celery, which drops each message
    of that id until it is forgotten, also of a job that was queued again since. ``expired`` is
    called with what a message held that had expired by its own header.
    """

    def revoke(panel: Any, task_id: Any, *_: Any, **__: Any) -> Any:
        ids = _texts(task_id)
        unknown = [id for id in ids if not cancel(id)]
        # Threads cannot be terminated: a running job reads from the ledger that it is cancelled.
        if unknown:
            _celery_revoke(panel, unknown)
        return {"ok": f"tasks {', '.join(ids)} flagged as revoked"}

    def terminate(panel: Any, signal: Any, task_id: Any, **__: Any) -> Any:
        return revoke(panel, task_id)

    def on_revoked(sender: Any, request: Any, **how: Any) -> None:
        named = dict(zip(PARAMETERS, request.args, strict=False)) | request.kwargs
        job = KINDS[sender.name], named["id"], named.get("request"), named.get("options")
        if how["expired"]:
            # Celery has revoked it to drop it, and would drop each later message of that id too.
            state.revoked.discard(request.id)
            expired(*job)
        elif dropped(*job):
            state.revoked.discard(request.id)

    control.Panel.data |= {"revoke": revoke, "terminate": terminate}
    task_revoked.connect(on_revoked, weak=False)


def _texts(ids: Any) -> list[str]:
    listed: Iterable[Any] = ids if isinstance(ids, list | tuple | set) else [ids]
    return [id for id in listed if isinstance(id, str)]
