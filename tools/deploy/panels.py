"""The dashboards: titles, queries and units."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Panel:
    """A graph of PromQL queries by the legends of their lines."""

    title: str
    queries: dict[str, str]
    unit: str = "short"
    text: str = ""


def _quantile(share: float, metric: str, by: str) -> str:
    return f"histogram_quantile({share}, sum by (le, {by}) (rate({metric}_bucket[5m])))"


FLEET = [
    Panel(
        "Predicted work",
        {"{{model}} {{state}}": "blipq_backlog_gpu_seconds"},
        "s",
        "GPU time of the jobs that wait and of those that run.",
    ),
    Panel("Workers", {"{{model}}": "blipq_workers"}),
    Panel("Waiting jobs", {"{{queue}}": "blipq_jobs_queued"}),
    Panel("Oldest waiting job", {"{{queue}}": "blipq_oldest_queued_seconds"}, "s"),
    Panel(
        "Open jobs",
        {
            "open": "blipq_jobs_open",
            "running": "blipq_jobs_running",
            "waiting for a retry": "blipq_jobs_delayed",
        },
    ),
    Panel(
        "Ended jobs a second",
        {"{{model}} {{outcome}}": "sum by (model, outcome) (rate(blipq_worker_jobs_total[5m]))"},
        "ops",
    ),
    Panel(
        "From submission to end",
        {
            "{{model}} median": _quantile(0.5, "blipq_worker_job_seconds", "model"),
            "{{model}} p95": _quantile(0.95, "blipq_worker_job_seconds", "model"),
        },
        "s",
    ),
    Panel(
        "Failures by code",
        {
            "{{code}}": "sum by (code)"
            ' (rate(blipq_worker_jobs_total{outcome=~"failed|retried"}[5m]))'
        },
        "ops",
    ),
    Panel(
        "GPU time by tenant",
        {"{{model}} {{tenant}}": "rate(blipq_gpu_seconds_total[5m])"},
        "s",
        "GPU seconds a second: 1 is one busy GPU.",
    ),
    Panel("Error of the prediction", {"{{model}}": "blipq_prediction_error_ratio"}, "percentunit"),
    Panel(
        "Dead letters and webhooks",
        {
            "dead letters": "blipq_dead_letters",
            "webhooks pending": "blipq_webhooks_pending",
            "webhooks dead": "blipq_webhooks_dead",
            "senders": "blipq_webhook_senders",
        },
    ),
    Panel(
        "Webhook attempts a second",
        {"{{outcome}}": "sum by (outcome) (rate(blipq_webhook_attempts_total[5m]))"},
        "ops",
    ),
    Panel(
        "Redis memory",
        {"used": "blipq_redis_memory_bytes", "limit": "blipq_redis_memory_limit_bytes"},
        "bytes",
    ),
    Panel("Redis answers", {"up": "blipq_ledger_up"}),
]

WORKERS = [
    Panel(
        "Time in each stage, p95",
        {"{{stage}}": _quantile(0.95, "blipq_worker_stage_seconds", "stage")},
        "s",
    ),
    Panel(
        "Until the first token, p95",
        {"{{model}}": _quantile(0.95, "blipq_worker_first_token_seconds", "model")},
        "s",
        "From a job's submission, its wait included.",
    ),
    Panel(
        "GPU use by jobs",
        {"{{instance}}": "sum by (instance) (rate(blipq_worker_gpu_seconds_total[5m]))"},
        "percentunit",
        "The share of time in which the device ran passes of jobs that have ended.",
    ),
    Panel(
        "GPU utilization",
        {"{{instance}} {{gpu}}": "blipq_worker_gpu_utilization_ratio"},
        "percentunit",
        "As the driver has it: the share of time in which any kernel ran.",
    ),
    Panel(
        "GPU memory",
        {
            "{{instance}} {{gpu}} used": "blipq_worker_gpu_memory_used_bytes",
            "{{instance}} {{gpu}} all": "blipq_worker_gpu_memory_bytes",
        },
        "bytes",
    ),
    Panel(
        "Jobs in a pass",
        {
            "{{model}}": "sum by (model) (rate(blipq_worker_batch_size_sum[5m]))"
            " / sum by (model) (rate(blipq_worker_batch_size_count[5m]))"
        },
    ),
    Panel(
        "Tokens a second",
        {"{{model}}": "sum by (model) (rate(blipq_worker_job_tokens_sum[5m]))"},
        "ops",
    ),
    Panel(
        "Tokens of a job",
        {"{{model}} p95": _quantile(0.95, "blipq_worker_job_tokens", "model")},
    ),
    Panel(
        "Images known from before",
        {
            "{{model}}": "sum by (model)"
            ' (rate(blipq_worker_feature_cache_total{found="hit"}[5m]))'
            " / sum by (model) (rate(blipq_worker_feature_cache_total[5m]))"
        },
        "percentunit",
    ),
    Panel(
        "Jobs held, and slots",
        {
            "{{instance}} held": "blipq_worker_jobs_held",
            "{{instance}} slots": "blipq_worker_slots",
        },
    ),
    Panel(
        "Since the model progressed",
        {"{{instance}}": "blipq_worker_stalled_seconds"},
        "s",
    ),
    Panel(
        "States",
        {
            "{{instance}} decode bound": "blipq_worker_decode_bound",
            "{{instance}} draining": "blipq_worker_draining",
            "{{instance}} engine serves": "blipq_worker_engine_serving",
            "{{instance}} passed its check": "blipq_worker_canary_passed",
            "{{instance}} fronts": "blipq_worker_fronts",
        },
    ),
    Panel(
        "CPU by process",
        {"{{instance}} {{process}}": "rate(blipq_worker_process_cpu_seconds_total[5m])"},
        "percentunit",
    ),
    Panel(
        "Memory by process",
        {"{{instance}} {{process}}": "blipq_worker_process_memory_bytes"},
        "bytes",
    ),
    Panel(
        "Malformed messages",
        {"{{outcome}}": "sum by (outcome) (rate(blipq_worker_messages_refused_total[5m]))"},
        "ops",
    ),
]

DASHBOARDS = {"blipq-fleet": ("blipq: fleet", FLEET), "blipq-workers": ("blipq: workers", WORKERS)}
