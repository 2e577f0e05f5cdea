"""Celery's remote control, for what it would do to a worker that serves by its settings.

``celery control`` and Flower can have a worker serve other queues, to hold other numbers of
tasks, or to wait between them. Celery would obey, and leave a worker that looks to the ledger like
one with room. Such commands are refused, with an answer that names what does the same.
"""

import logging
from collections.abc import Callable
from typing import Any

from celery.worker import control

log = logging.getLogger(__name__)

_BY_SETTING = "how many jobs a worker holds is fixed at its start: set BLIPQ_CONCURRENCY"
_BY_MODELS = "a worker serves the queues of BLIPQ_MODELS until it ends: start or stop one"
#: Why a command is refused, and what to do instead.
REFUSED = {
    "revoke_by_stamped_headers": "workers read no stamps: revoke by ids, or use blipq cancel ID",
    "rate_limit": "a worker takes jobs as fast as its models answer them",
    "time_limit": "threads cannot be interrupted: set BLIPQ_JOB_TIMEOUT_S, or a job's expires_in",
    "pool_grow": _BY_SETTING,
    "pool_shrink": _BY_SETTING,
    "autoscale": _BY_SETTING,
    "pool_restart": "a worker is started again by its supervisor: stop it with shutdown or SIGTERM",
    "add_consumer": _BY_MODELS,
    "cancel_consumer": _BY_MODELS,
    "report": "it would show the broker's password: use blipq doctor",
}

#: What may be shown of the broker: its options and the other addresses of a list hold passwords.
_BROKER = ("transport", "hostname", "port", "virtual_host", "userid", "connect_timeout")

_celery_conf = control.conf  # type: ignore[attr-defined]
_celery_stats = control.stats  # type: ignore[attr-defined]


def refuse_controls() -> None:
    """Refuses what would change what a worker runs, and shows no broker's password."""
    control.Panel.data |= {name: _refusing(name, why) for name, why in REFUSED.items()}
    control.Panel.data |= {"conf": _conf, "dump_conf": _conf, "stats": _stats}


def _refusing(name: str, why: str) -> Callable[..., dict[str, str]]:
    def refuse(panel: Any, *_: Any, **__: Any) -> dict[str, str]:
        log.warning("remote control: %s is refused: %s", name, why)
        return {"error": f"blipq refuses {name}: {why}"}

    return refuse


def _conf(panel: Any, with_defaults: bool = False, **_: Any) -> dict[str, Any]:
    """Celery hides passwords in the one setting of the broker's URL that blipq does not use."""
    conf: dict[str, Any] = _celery_conf(panel, with_defaults=with_defaults)
    return {name: value for name, value in conf.items() if not name.startswith("broker_")}


def _stats(panel: Any, **_: Any) -> dict[str, Any]:
    stats: dict[str, Any] = _celery_stats(panel)
    broker = stats["broker"]
    return stats | {"broker": {name: broker[name] for name in _BROKER if name in broker}}
