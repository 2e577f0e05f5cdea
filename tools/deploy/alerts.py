"""The alerts: what each looks at, what a rule test feeds it, and its runbook."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Alert:
    """An alert on a PromQL expression that has held for ``minutes``.

    series: for its test, samples a minute apart in promtool's notation, which make it fire at
    ``at`` minutes; labels: those that it fires with. meaning, action: for the page of runbooks.
    """

    name: str
    expr: str
    minutes: int
    severity: str
    summary: str
    meaning: str
    action: str
    series: dict[str, str]
    labels: dict[str, str] = field(default_factory=dict)
    at: int = 30


ALERTS = [
    Alert(
        name="BlipqNoWorkers",
        expr='blipq_backlog_gpu_seconds{state="waiting"} > 0'
        " and on (model) sum by (model) (blipq_workers) == 0",
        minutes=10,
        severity="page",
        summary="Jobs of {{ $labels.model }} wait, and no worker serves it.",
        meaning="Jobs wait, and no worker that serves their model has lived for ten minutes.",
        action="Look at the workers' logs and at `blipq doctor`. Where the fleet scales to zero,"
        " look at the ScaledObject (`kubectl describe scaledobject`) and at pods without a place.",
        series={
            'blipq_backlog_gpu_seconds{model="default",state="waiting"}': "5x40",
            'blipq_workers{model="default"}': "0x40",
        },
        labels={"model": "default", "state": "waiting"},
    ),
    Alert(
        name="BlipqOldJobs",
        expr="blipq_oldest_queued_seconds > 900",
        minutes=5,
        severity="warn",
        summary="A job of {{ $labels.queue }} has waited for {{ $value | humanizeDuration }}.",
        meaning="The oldest job of a queue has waited for a quarter of an hour.",
        action="Compare the predicted work with the number of workers: add some, or look for what"
        " keeps those that are there from working (`blipq doctor`).",
        series={'blipq_oldest_queued_seconds{queue="blipq.default.normal"}': "0+60x40"},
        labels={"queue": "blipq.default.normal"},
    ),
    Alert(
        name="BlipqDeadLetters",
        expr="delta(blipq_dead_letters[15m]) > 0",
        minutes=0,
        severity="warn",
        summary="{{ $value | humanize }} jobs were given up within 15 minutes.",
        meaning="Each of these jobs has ended its worker three times, twice while it ran alone."
        " Jobs that failed in every attempt are no dead letters: see `BlipqFailures`.",
        action="`blipq dead-letters list` names them, the workers' logs say how they died. Keep the"
        " image and report it; `blipq dead-letters retry` runs a job once more.",
        series={"blipq_dead_letters": "0x20 3x20"},
    ),
    Alert(
        name="BlipqFailures",
        expr='sum by (model) (rate(blipq_worker_jobs_total{outcome="failed"}[10m]))'
        ' / sum by (model) (rate(blipq_worker_jobs_total{outcome=~"succeeded|failed"}[10m]))'
        " > 0.1",
        minutes=10,
        severity="warn",
        summary="{{ $value | humanizePercentage }} of the jobs of {{ $labels.model }} fail.",
        meaning="More than a tenth of a model's jobs have failed for ten minutes.",
        action="The label `code` of `blipq_worker_jobs_total` is the cause. `image_not_found` and"
        " `image_forbidden` are about the bucket or the worker's keys, `image_invalid` about what a"
        " producer sends, `internal` about the worker: see its log.",
        series={
            'blipq_worker_jobs_total{model="default",outcome="failed"}': "0+20x40",
            'blipq_worker_jobs_total{model="default",outcome="succeeded"}': "0+80x40",
        },
        labels={"model": "default"},
    ),
    Alert(
        name="BlipqStalled",
        expr="blipq_worker_stalled_seconds > 60",
        minutes=0,
        severity="page",
        summary="The model of {{ $labels.instance }} has made no progress for a minute.",
        meaning="A pass of the model does not end. The worker ends itself after `BLIPQ_WATCHDOG_S`"
        " (two minutes by default).",
        action="Look at the GPU (`nvidia-smi`, `dmesg` for Xid). If workers end so again and again,"
        " take the host out.",
        series={'blipq_worker_stalled_seconds{instance="w1"}': "0x20 61+60x20"},
        labels={"instance": "w1"},
    ),
    Alert(
        name="BlipqEngineAway",
        expr="blipq_worker_engine_serving == 0",
        minutes=20,
        severity="warn",
        summary="The engine of {{ $labels.instance }} does not serve.",
        meaning="A model has failed its canary, the check of its answers, after jobs"
        " of its own had failed, or its engine process does not come back. A worker whose model"
        " fails it at the start ends with code 78: that is `BlipqNoWorkers` once jobs wait.",
        action="The worker's log, `/readyz` and `blipq_worker_canary_passed` show which. After a"
        " canary refusal, compare driver, precision and revision with what the goldens were"
        " recorded with; do not switch the canary off.",
        series={'blipq_worker_engine_serving{instance="w1"}': "0x40"},
        labels={"instance": "w1"},
    ),
    Alert(
        name="BlipqDecodeBound",
        expr="blipq_worker_decode_bound == 1",
        minutes=15,
        severity="warn",
        summary="The model of {{ $labels.instance }} waits for images to be decoded.",
        meaning="The host has too few cores for its GPU, or pictures are very large.",
        action="Give the worker more cores, or more of them to `BLIPQ_FRONTS`; have producers"
        " upload smaller pictures.",
        series={'blipq_worker_decode_bound{instance="w1"}': "1x40"},
        labels={"instance": "w1"},
    ),
    Alert(
        name="BlipqWebhooksDead",
        expr="delta(blipq_webhooks_dead[15m]) > 0",
        minutes=0,
        severity="warn",
        summary="{{ $value | humanize }} webhook events were given up within 15 minutes.",
        meaning="A receiver has refused events, or has not answered, for all of the attempts.",
        action="`blipq webhooks list` shows the receivers' answers. Once they work again:"
        " `blipq webhooks replay`.",
        series={"blipq_webhooks_dead": "0x20 2x20"},
    ),
    Alert(
        name="BlipqNoSender",
        expr="blipq_webhooks_pending > 0 and blipq_webhook_senders == 0",
        minutes=5,
        severity="page",
        summary="{{ $value | humanize }} webhook events wait, and no sender runs.",
        meaning="Jobs have webhooks, and no sender runs.",
        action="Start `blipq webhooks run`. Events wait for 14 days.",
        series={"blipq_webhooks_pending": "4x40", "blipq_webhook_senders": "0x40"},
    ),
    Alert(
        name="BlipqLedgerDown",
        expr="blipq_ledger_up == 0 or absent(blipq_ledger_up)",
        minutes=2,
        severity="page",
        summary="The exporter does not reach Redis, or nobody reaches the exporter.",
        meaning="No job can be submitted while Redis is away. Jobs that run go on.",
        action="Look at Redis first, then at the exporter (`blipq metrics`). After an outage,"
        " `blipq doctor`.",
        series={"blipq_ledger_up": "0x40"},
    ),
    Alert(
        name="BlipqRedisMemory",
        expr="blipq_redis_memory_bytes / (blipq_redis_memory_limit_bytes > 0) > 0.7",
        minutes=5,
        severity="page",
        summary="Redis uses {{ $value | humanizePercentage }} of what it may hold.",
        meaning="At 100 % submits raise `QueueFull`. A rewrite of the append-only file needs room,"
        " too.",
        action="Raise maxmemory, lower `BLIPQ_MAX_OPEN_JOBS`, or shorten `BLIPQ_RESULT_TTL`, which"
        " is also how long idempotency keys hold.",
        series={"blipq_redis_memory_bytes": "8x40", "blipq_redis_memory_limit_bytes": "10x40"},
    ),
    Alert(
        name="BlipqPredictionOff",
        expr="blipq_prediction_error_ratio > 0.5",
        minutes=60,
        severity="warn",
        summary="Work of {{ $labels.model }} is mispredicted by {{ $value | humanizePercentage }}.",
        meaning="Jobs of one shape take very different times, so what scales on predicted work is"
        " misled.",
        action="Compare `gpu_ms` in receipts: GPUs of different kinds serve one model name, or the"
        " cache hits in bursts. Give each kind of GPU a model name of its own.",
        series={'blipq_prediction_error_ratio{model="default"}': "0.6x100"},
        labels={"model": "default"},
        at=90,
    ),
]
