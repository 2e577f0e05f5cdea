"""How much work is ahead of a fleet, model by model: what metrics show, and what scales on it."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from blipq.ledger import keys
from blipq.ledger.work import Costs, Work, work_of

if TYPE_CHECKING:
    import redis


@dataclass(frozen=True, slots=True)
class Outlook:
    """Of a model. error: see ``Costs``. used_ms: what jobs took so far, by tenant ('' is none)."""

    work: Work
    error: float | None
    used_ms: Mapping[str, float]


def outlooks(client: "redis.Redis") -> dict[str, Outlook]:
    """By model, of all that a worker has served lately or that have a queue in use.

    A few commands a model, whatever the backlog. Raises redis.RedisError.
    """
    queues = cast("list[str]", client.zrange(keys.QUEUES, 0, -1))
    served = cast("list[str]", client.zrange(keys.MODELS, 0, -1))
    models = sorted({*served, *map(keys.model_of, queues)})
    with client.pipeline(transaction=False) as pipe:
        for model in models:
            for key in (keys.work, keys.working, keys.cost, keys.used):
                pipe.hgetall(key(model))
            for queue in keys.queues_of(model):
                pipe.zcard(keys.queued(queue))
        found = pipe.execute()
    parts = [found[at : at + 7] for at in range(0, len(found), 7)]
    return {model: _outlook(part[:4], part[4:]) for model, part in zip(models, parts, strict=True)}


def work_page(clients: Iterable["redis.Redis"], model: str) -> dict[str, float]:
    """Predicted GPU-seconds of a model's jobs in all cells, for an autoscaler.

    0 where nobody has used a model yet: at an error the autoscaler would fall back on a number of
    workers that have nothing to do. Raises redis.RedisError.
    """
    found = [each.work for client in clients if (each := outlooks(client).get(model))]
    work = Work(sum(each.waiting_s for each in found), sum(each.running_s for each in found))
    return {"waiting_s": work.waiting_s, "running_s": work.running_s, "total_s": work.total_s}


def _outlook(hashes: Sequence[Mapping[str, str]], waiting: Sequence[int]) -> Outlook:
    """From a model's hashes, and how many jobs wait in each of its queues."""
    open_, working, learned, used = hashes
    costs = Costs(learned)
    used_ms = {tenant: float(ms) for tenant, ms in used.items()}
    return Outlook(work_of(costs, open_, working, sum(waiting)), costs.error, used_ms)
