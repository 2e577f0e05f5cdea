"""Every name of blipq's in Redis and in the broker, spelled here alone.

A change of one of them breaks running clients and workers of other versions. The scripts get the
same names from ``lua_header``. ``docs/architecture.md`` has a table of the keys. Times are
milliseconds on Redis' clock.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

from blipq.contract import Kind, Priority

OPEN = "blipq:open"  # zset: id -> deadline, of each job that has not ended
RUNNING = "blipq:running"  # zset: id -> end of the lease
DELAYED = "blipq:delayed"  # zset: id -> when the retry is due
TENANTS = "blipq:tenants"  # zset: tenant with open jobs -> when its set of them was written
LIMITS = "blipq:limits"  # hash: tenant, or * for the others -> most open jobs and jobs a second
MOVES = "blipq:moves"  # string: exists while any job has moved on from this cell
QUEUES = "blipq:queues"  # zset: queue -> last use
DEAD_LETTERS = "blipq:dead-letters"  # zset: id -> when it was given up
WORKERS = "blipq:workers"  # zset: worker -> until when it counts as live
LISTS = "blipq:lists"  # zset: name of a list of jobs -> the hour in which they were submitted
MODELS = "blipq:models"  # zset: model -> when a worker last registered it
SENDERS = "blipq:senders"  # zset: sender of webhooks -> until when it counts as live
OUTBOX = "blipq:outbox"  # zset: host -> when its next webhook event is due
DEAD_EVENTS = "blipq:dead-events"  # zset: event id -> when it was given up
EVENT_COUNTS = "blipq:event-counts"  # hash: outcome of an attempt -> count
FORGOTTEN = "blipq:forgotten"  # zset: SHA-1 of an image's URI -> when its job was erased
ACTIONS = "blipq:actions"  # stream: the log of actions
RUNS = "blipq:runs"  # zset: bulk -> when its run was noted last, in seconds
SWEEPER = "blipq:reconciler"  # string: since when which worker sweeps
STRAYS_LOCK = "blipq:strays"  # string: the worker that scans for stray queues


def job(id: str) -> str:
    """Hash: the job's record."""
    return f"blipq:job:{id}"


def idempotency(key: str) -> str:
    """String: the id of the job with an idempotency key."""
    return f"blipq:idempotency:{key}"


def queued(queue: str) -> str:
    """Zset: id -> when its message was published last, of the jobs that wait in a queue."""
    return f"blipq:queued:{queue}"


def again(queue: str) -> str:
    """Zset: id -> when its message was published first, of those that were published again."""
    return f"blipq:again:{queue}"


def claimed(queue: str) -> str:
    """String: when the newest job that was claimed from a queue was published."""
    return f"blipq:claimed:{queue}"


def taken(queue: str) -> str:
    """String: when a job was last claimed from a queue."""
    return f"blipq:taken:{queue}"


def passed(queue: str) -> str:
    """String: when the reconciler noted ``claimed``, what it was, and what it was before that."""
    return f"blipq:passed:{queue}"


def paused(queue: str) -> str:
    """String: 0 while a queue is paused, then when it was resumed."""
    return f"blipq:paused:{queue}"


def listed(name: str) -> str:
    """Zset: id -> when it was submitted, of the jobs of a list (see ``ListName``)."""
    return f"blipq:listed:{name}"


def tenant(name: str) -> str:
    """Zset: id -> when it was submitted, of the open jobs of a tenant."""
    return f"blipq:tenant:{name}"


def moved(digest: str) -> str:
    """String: version and name of the cell that has a job in place of this one.

    For the SHA-1 digest of its key or id: see ``moved_to`` of the scripts.
    """
    return f"blipq:moved:{digest}"


def rate(tenant: str) -> str:
    """String: until when the jobs that a tenant submitted last use its rate up, in ms."""
    return f"blipq:rate:{tenant}"


def worker(name: str) -> str:
    """String: what a live worker reports of itself, as JSON."""
    return f"blipq:worker:{name}"


def serving(model: str) -> str:
    """Zset: worker -> until when it counts as live, of the workers that serve a model."""
    return f"blipq:serving:{model}"


def spare(model: str) -> str:
    """String: exists while a worker of the model has had room for a whole grace period."""
    return f"blipq:spare:{model}"


def work(model: str) -> str:
    """Hash: shape -> how many open jobs of a model have it. See ``blipq.ledger.work``."""
    return f"blipq:work:{model}"


def working(model: str) -> str:
    """Hash: shape -> how many of these a worker holds."""
    return f"blipq:working:{model}"


def cost(model: str) -> str:
    """Hash: shape -> what such jobs of a model took; ``error`` -> how far predictions were off."""
    return f"blipq:cost:{model}"


def used(model: str) -> str:
    """Hash: tenant -> the GPU milliseconds that its jobs took of a model."""
    return f"blipq:used:{model}"


def withdrawn(nonce: str) -> str:
    """String: exists while a claim that was withdrawn by its nonce may still arrive."""
    return f"blipq:withdrawn:{nonce}"


def outbox(host: str) -> str:
    """Zset: event id -> when it is due, of the webhook events for a host."""
    return f"{OUTBOX}:{host}"


def event(event: str) -> str:
    """Hash: a webhook event."""
    return f"blipq:event:{event}"


def stopped(digest: str) -> str:
    """String: exists for the SHA-1 digest of a webhook URL that answered 410."""
    return f"blipq:stopped:{digest}"


def session(digest: str) -> str:
    """String: the digest of a session's key, for the SHA-256 of the token in its cookie."""
    return f"blipq:session:{digest}"


def selection(digest: str) -> str:
    """String: jobs that the session of a digest has counted in the console, to change them."""
    return f"blipq:selection:{digest}"


def watch(name: str) -> str:
    """String: how far a watch has listed, as JSON."""
    return f"blipq:watch:{name}"


def run(bulk: str) -> str:
    """String: how far the run of a bulk is, as JSON."""
    return f"blipq:run:{bulk}"


def ended_channel(client: str) -> str:
    """The channel on which a client process receives the ids of its jobs as they end."""
    return f"blipq:ended:{client}"


#: The client of jobs that another Celery client sent whole.
FOREIGN = "foreign"


def waiting(queue: str) -> tuple[str, str]:
    """Both zsets of the jobs that wait in a queue; the oldest has the lowest score."""
    return queued(queue), again(queue)


# --- Celery's queues and tasks --------------------------------------------------------------------


def queue_name(model: str, priority: Priority) -> str:
    """The Celery queue of a served model at a priority."""
    return f"blipq.{model}.{priority}"


def queues_of(model: str) -> list[str]:
    """The queues of a served model, high priority first."""
    return [queue_name(model, priority) for priority in Priority]


_QUEUE = re.compile(rf"blipq\.(?P<model>.+)\.(?:{'|'.join(Priority)})")


def is_queue(name: str) -> bool:
    """Whether it is the name of a queue, of whatever model."""
    return _QUEUE.fullmatch(name) is not None


def model_of(queue: str) -> str:
    """The served model of a queue."""
    return queue.removeprefix("blipq.").rpartition(".")[0]


def task_name(kind: Kind) -> str:
    """The Celery task of a kind, so that monitors show what runs."""
    return f"blipq.{kind}"


#: Between a queue and a message priority in the names of kombu's lists.
_KOMBU_SEPARATOR = "\x06\x16"
_BROKER_KEY = re.compile(
    r"(?P<binding>_kombu\.binding\.)?blipq\.(?P<model>.+)\.(?:high|normal|low)"
    rf"(?:{_KOMBU_SEPARATOR}[0-9])?"
)
#: Matches every key of ``broker_key``, and some others.
BROKER_KEYS = "*blipq.*"
#: Where kombu kept copies of unacknowledged messages, for workers of earlier versions.
UNACKED = "unacked"  # hash: tag -> [message, exchange, queue] as JSON
UNACKED_INDEX = "unacked_index"  # zset: tag -> when it was taken, in seconds


@dataclass(frozen=True, slots=True)
class BrokerKey:
    """A key that kombu keeps for a queue in a Redis broker: a list of messages, or its binding."""

    model: str
    is_binding: bool


def broker_key(key: str) -> BrokerKey | None:
    """What a key of a Redis broker is for; None if it is not a key of our queues."""
    match = _BROKER_KEY.fullmatch(key)
    return match and BrokerKey(match["model"], bool(match["binding"]))


# --- the same names for the scripts ---------------------------------------------------------------

_CONSTANTS = {
    "OPEN": OPEN,
    "RUNNING": RUNNING,
    "DELAYED": DELAYED,
    "MOVES": MOVES,
    "QUEUES": QUEUES,
    "DEAD_LETTERS": DEAD_LETTERS,
    "WORKERS": WORKERS,
    "LISTS": LISTS,
    "TENANTS": TENANTS,
    "LIMITS": LIMITS,
    "ACTIONS": ACTIONS,
    "MODELS": MODELS,
    "OUTBOX": OUTBOX,
    "FORGOTTEN": FORGOTTEN,
    "FOREIGN_CHANNEL": ended_channel(FOREIGN),
    "SWEEPER": SWEEPER,
    "DEAD_EVENTS": DEAD_EVENTS,
    "EVENT_COUNTS": EVENT_COUNTS,
    "KOMBU_SEPARATOR": _KOMBU_SEPARATOR,
}
_FUNCTIONS: tuple[Callable[[str], str], ...] = (
    *(job, idempotency, queued, again, claimed, taken, passed, paused, listed),
    *(worker, serving, spare, withdrawn, outbox, event, stopped),
    *(work, working, cost, used, tenant, rate, moved),
)
#: ``model_of``. A pattern, as a model's name may have dots.
_MODEL_OF = r"local function model_of(queue) return string.match(queue, '^blipq%.(.+)%.%a+$') end"


def lua_header() -> str:
    """The names as Lua locals: constants as here, functions as ``job_key(id)`` and so on."""
    constants = [f"local {name} = '{key}'" for name, key in _CONSTANTS.items()]
    functions = [
        f"local function {key.__name__}_key(name) return '{key('')}' .. name end"
        for key in _FUNCTIONS
    ]
    return "\n".join([*constants, *functions, _MODEL_OF, ""])
