"""Prometheus metrics: what the ledger holds, what a sender does, and how both are served.

What the ledger holds is the same for all, so one exporter (``blipq metrics``) shows it for the
whole fleet. Workers (``blipq_worker.process.metrics``) and senders show only what they themselves
do.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, cast

import redis
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from blipq.ledger import keys
from blipq.ledger.views.tenants import tenants
from blipq.ops.forecast import forecast
from blipq.ops.outlook import outlooks
from blipq.webhooks.outbox import redis_ms

if TYPE_CHECKING:
    from prometheus_client.core import Metric


#: Tenants with labels of their own, the most open jobs first; all others are counted as OTHERS.
MOST_TENANTS, OTHERS = 200, "~others"


class LedgerCollector(Collector):
    """Counts what the ledger holds at each scrape: a few commands a queue, whatever the backlog."""

    def __init__(self, client: "redis.Redis") -> None:
        self._redis = client

    def describe(self) -> "Iterable[Metric]":
        """Nothing: registering must not ask Redis."""
        return []

    def collect(self) -> "Iterator[Metric]":
        """All of it, or only ``blipq_ledger_up 0``."""
        try:
            families = [
                *(*self._jobs(), *self._queues(), *self._work()),
                *(*self._webhooks(), *self._memory(), *self._forecast(), *self._tenants()),
            ]
        except redis.RedisError:
            yield GaugeMetricFamily("blipq_ledger_up", "Whether Redis answers.", 0)
            return
        yield GaugeMetricFamily("blipq_ledger_up", "Whether Redis answers.", 1)
        yield from families

    def _memory(self) -> "Iterator[Metric]":
        found = cast("dict[str, int]", self._redis.info("memory"))
        limit = found.get("maxmemory") or found.get("total_system_memory") or 0
        yield GaugeMetricFamily(
            "blipq_redis_memory_bytes", "What Redis holds.", found["used_memory"]
        )
        yield GaugeMetricFamily(
            "blipq_redis_memory_limit_bytes", "What it may hold, or its machine.", limit
        )

    def _jobs(self) -> "Iterator[Metric]":
        counted = (
            ("blipq_jobs_open", "Jobs that have not ended.", keys.OPEN),
            ("blipq_jobs_running", "Jobs that a worker holds.", keys.RUNNING),
            ("blipq_jobs_delayed", "Jobs that wait for a retry.", keys.DELAYED),
            ("blipq_dead_letters", "Jobs that ended three workers, still kept.", keys.DEAD_LETTERS),
        )
        with self._redis.pipeline(transaction=False) as pipe:
            for _, _, key in counted:
                pipe.zcard(key)
            sizes = pipe.execute()
        for (name, text, _), size in zip(counted, sizes, strict=True):
            yield GaugeMetricFamily(name, text, size)

    def _queues(self) -> "Iterator[Metric]":
        queues = cast("list[str]", self._redis.zrange(keys.QUEUES, 0, -1))
        models = sorted({keys.model_of(queue) for queue in queues})
        with self._redis.pipeline(transaction=False) as pipe:
            for queue in queues:
                pipe.zcard(keys.queued(queue))
                pipe.get(keys.paused(queue))
                for key in keys.waiting(queue):
                    pipe.zrange(key, 0, 0, withscores=True)
            seconds, micros = self._redis.time()
            now = seconds + micros / 1e6
            for model in models:
                pipe.zcount(keys.serving(model), now * 1000, "+inf")
            found = pipe.execute()
        depth = GaugeMetricFamily("blipq_jobs_queued", "Jobs that wait.", labels=["queue"])
        age = GaugeMetricFamily(
            "blipq_oldest_queued_seconds", "Since the oldest was published.", labels=["queue"]
        )
        paused = GaugeMetricFamily(
            "blipq_queue_paused", "Whether workers take no jobs from it.", labels=["queue"]
        )
        for place, queue in enumerate(queues):
            size, pause, *first = found[4 * place : 4 * place + 4]
            paused.add_metric([queue], pause == "0")
            since = [score for each in first for _, score in each]
            depth.add_metric([queue], size)
            age.add_metric([queue], max(0.0, now - min(since) / 1000) if since else 0)
        workers = GaugeMetricFamily("blipq_workers", "Live workers of a model.", labels=["model"])
        for model, count in zip(models, found[4 * len(queues) :], strict=True):
            workers.add_metric([model], count)
        yield from (depth, age, paused, workers)

    def _forecast(self) -> "Iterator[Metric]":
        if (found := forecast(self._redis)) is None:
            return
        for name, text, value in (
            ("blipq_redis_memory_forecast_bytes", "What it will hold at this rate.", found.later),
            ("blipq_jobs_ended_per_second", "Jobs that ended, of those kept.", found.rate),
        ):
            yield GaugeMetricFamily(name, text, value)

    def _work(self) -> "Iterator[Metric]":
        backlog = GaugeMetricFamily(
            "blipq_backlog_gpu_seconds",
            "Predicted GPU time of the jobs that wait, and of those that run.",
            labels=["model", "state"],
        )
        error = GaugeMetricFamily(
            "blipq_prediction_error_ratio",
            "How far predictions were off lately, as a share of what the jobs took.",
            labels=["model"],
        )
        used = CounterMetricFamily(
            "blipq_gpu_seconds", "GPU time that jobs took.", labels=["model", "tenant"]
        )
        for model, outlook in outlooks(self._redis).items():
            backlog.add_metric([model, "waiting"], outlook.work.waiting_s)
            backlog.add_metric([model, "running"], outlook.work.running_s)
            if outlook.error is not None:
                error.add_metric([model], outlook.error)
            for tenant, ms in sorted(outlook.used_ms.items()):
                used.add_metric([model, tenant], ms / 1000)
        yield from (backlog, error, used)

    def _tenants(self) -> "Iterator[Metric]":
        open_ = GaugeMetricFamily("blipq_tenant_jobs_open", "Open jobs.", labels=["tenant"])
        oldest = GaugeMetricFamily(
            "blipq_tenant_oldest_seconds", "Since the oldest was submitted.", labels=["tenant"]
        )
        states = tenants(self._redis)
        for state in states[:MOST_TENANTS]:
            open_.add_metric([state.tenant], state.open)
            oldest.add_metric([state.tenant], state.oldest_s or 0)
        if rest := states[MOST_TENANTS:]:
            open_.add_metric([OTHERS], sum(state.open for state in rest))
            oldest.add_metric([OTHERS], max(state.oldest_s or 0 for state in rest))
        yield from (open_, oldest)

    def _webhooks(self) -> "Iterator[Metric]":
        hosts = cast("list[str]", self._redis.zrange(keys.OUTBOX, 0, -1))
        with self._redis.pipeline(transaction=False) as pipe:
            for host in hosts:
                pipe.zcard(keys.outbox(host))
            pending = sum(pipe.execute())
        dead = self._redis.zcard(keys.DEAD_EVENTS)
        senders = self._redis.zcount(keys.SENDERS, redis_ms(self._redis), "+inf")
        counts = cast("dict[str, str]", self._redis.hgetall(keys.EVENT_COUNTS))
        yield GaugeMetricFamily("blipq_webhooks_pending", "Events not delivered yet.", pending)
        yield GaugeMetricFamily("blipq_webhooks_dead", "Events given up, still kept.", dead)
        yield GaugeMetricFamily("blipq_webhook_senders", "Live senders.", senders)
        attempts = CounterMetricFamily(
            "blipq_webhook_attempts", "Attempts of all senders, by outcome.", labels=["outcome"]
        )
        for outcome, count in sorted(counts.items()):
            attempts.add_metric([outcome], int(count))
        yield attempts


class CellsCollector(Collector):
    """What the ledgers of several cells hold: each metric with the label ``cell``."""

    def __init__(self, collectors: Mapping[str, LedgerCollector]) -> None:
        self._collectors = collectors

    def describe(self) -> "Iterable[Metric]":
        """Nothing: registering must not ask Redis."""
        return []

    def collect(self) -> "Iterable[Metric]":
        """Each cell's metrics; of one that is away only ``blipq_ledger_up 0``."""
        found: dict[str, Metric] = {}
        for cell, collector in self._collectors.items():
            for family in collector.collect():
                samples = [
                    each._replace(labels={"cell": cell, **each.labels}) for each in family.samples
                ]
                known = found.setdefault(family.name, family)
                known.samples = samples if known is family else known.samples + samples
        return found.values()
