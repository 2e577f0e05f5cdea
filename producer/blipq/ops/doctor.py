"""``blipq doctor``: looks at everything a job needs, from where this process stands.

Each finding is ok, or says what to do. Light like the rest of the producer's side: what only a
worker can know, a command of the worker's says in a process of its own.
"""

import importlib.metadata
import importlib.util
import json
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any, Literal, cast

import redis

from blipq.client.sync_client import Client
from blipq.contract import CONTRACT
from blipq.errors import BlipqError, ResultTimeout
from blipq.ledger import keys
from blipq.ledger.connection import connect
from blipq.ledger.operator import OperatorLedger
from blipq.local.sample import red_square
from blipq.local.worker import has_worker
from blipq.program import blipq
from blipq.redaction import place_of, redacted
from blipq.redis.url import tls_of
from blipq.s3.refusals import status_of
from blipq.s3.storage import Storage
from blipq.settings import Settings
from blipq.transport.broker import broker_address
from blipq.webhooks.outbox import Outbox

State = Literal["ok", "warn", "bad"]

CANARY_TIMEOUT_S = 30.0
OLDEST_REDIS = (6, 2)
#: Signatures of S3 requests are refused from a difference of 15 minutes.
SKEW_WARN_S, SKEW_BAD_S = 30.0, 600.0
#: An object in the inbox that the checks write; always the same, so that nothing piles up.
PROBE_KEY = "blipq-doctor"


@dataclass(frozen=True, slots=True)
class Finding:
    """One line: what was looked at, how it is, and what to do if it is not right."""

    state: State
    check: str
    message: str
    advice: str | None = None


Findings = Iterator[Finding]


def examine(
    settings: Settings, *, canary: bool = True, torch: bool = False, create_bucket: bool = False
) -> Findings:
    """Every finding, in the order in which a job meets what is checked.

    canary: run a real job. torch: import torch to ask it for CUDA. create_bucket: make the inbox
    bucket if it is missing.
    """
    yield Finding("ok", "endpoints", f"{settings.endpoints}, from {socket.gethostname()}")
    yield from _each(settings, "tls", _tls)
    seen = yield from _each(settings, "redis", _redis)
    redis_answers = not _is_bad(seen, "redis")
    if settings.broker_url is not None:
        yield from _each(settings, "broker", _broker)

    def s3(settings: Settings) -> Findings:
        return _s3(settings, create_bucket=create_bucket)

    seen = yield from _each(settings, "s3", s3)
    uploads = not _is_bad(seen, "s3", "s3 credentials", "s3 write", "s3 conditional write")
    served = False
    if redis_answers:
        seen = yield from _each(settings, "workers", _workers)
        served = all(each.state == "ok" for each in seen if each.check == "workers")
        yield from _each(settings, "queues", _queues)
        yield from _each(settings, "webhooks", _webhooks)
    yield from _each(settings, "this machine", lambda _: _machine(torch))
    if canary and redis_answers and uploads and served:
        yield from _each(settings, "canary", _canary)
    elif canary:
        message = "not run: it needs Redis, S3 and a live worker of the model 'default'"
        yield Finding("warn", "canary", message)


def _is_bad(seen: list[Finding], *checks: str) -> bool:
    return any(finding.state == "bad" and finding.check in checks for finding in seen)


def _each(
    settings: Settings, check: str, look: Callable[[Settings], Findings]
) -> Generator[Finding, None, list[Finding]]:
    """One group of findings, without secrets; returns them, too."""
    seen: list[Finding] = []
    try:
        for finding in look(settings):
            seen.append(_without_secrets(settings, finding))
            yield seen[-1]
    except Exception as error:  # a doctor reports whatever it meets
        text = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        seen.append(_without_secrets(settings, Finding("bad", check, text)))
        yield seen[-1]
    return seen


def _without_secrets(settings: Settings, finding: Finding) -> Finding:
    secrets = settings.secrets
    advice = finding.advice and redacted(finding.advice, secrets)
    return Finding(finding.state, finding.check, redacted(finding.message, secrets), advice)


# --- Redis and the broker -------------------------------------------------------------------------


def _tls(settings: Settings) -> Findings:
    """Only what the URLs say: a server that cannot be verified does not answer below."""
    for option, url in (("redis_url", settings.redis_url), ("broker_url", settings.broker_url)):
        tls = tls_of(url) if url else None
        if tls and not tls.names_checked:
            what = "the host's name" if tls.verified else "the server"
            message = f"{option}: {what} is not verified: who is in between can read the password"
            advice = "name its authority with ssl_ca_certs, and leave the other ssl_ options out"
            yield Finding("warn", "tls", message, advice)


def _redis(settings: Settings) -> Findings:
    with connect(settings) as client:
        before = time.time()
        try:
            client.ping()
        except redis.AuthenticationError as error:
            advice = f"set BLIPQ_REDIS_URL with its password; `{blipq('env')}` has a local stack's"
            yield Finding("bad", "redis", f"it refuses the user or password: {error}", advice)
            return
        except redis.ResponseError as error:
            advice = "set BLIPQ_REDIS_URL to a database and a user that it has"
            yield Finding("bad", "redis", f"it refuses: {error}", advice)
            return
        except redis.RedisError as error:
            advice = f"start Redis or `{blipq('up')}`, or set BLIPQ_REDIS_URL"
            yield Finding("bad", "redis", f"it does not answer: {error}", advice)
            return
        took = time.time() - before
        info = cast("dict[str, Any]", client.info())
        yield _redis_version(info, took)
        yield from _redis_settings(info)
        yield from _redis_memory(info)
        before = time.time()
        seconds, microseconds = cast("tuple[int, int]", client.time())
        here = (before + time.time()) / 2
        yield _skew("redis clock", seconds + microseconds / 1e6 - here)


def _redis_version(info: dict[str, Any], took: float) -> Finding:
    name = "valkey" if "valkey_version" in info else "redis"
    version = str(info.get("valkey_version") or info.get("redis_version"))
    message = f"{name} {version} answers in {took * 1000:.1f} ms"
    if info.get("role") not in (None, "master"):
        return Finding("bad", "redis", f"{message}, as a replica", "name the primary")
    if info.get("cluster_enabled"):
        advice = "take one Redis with replicas: neither the ledger nor Celery run on a cluster"
        return Finding("bad", "redis", f"{message}, as a cluster", advice)
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    if numbers < OLDEST_REDIS:
        return Finding("warn", "redis", message, "blipq is tested on 6.2 and later: upgrade")
    return Finding("ok", "redis", message)


def _redis_settings(info: dict[str, Any]) -> Findings:
    policy = info.get("maxmemory_policy")
    if policy == "noeviction":
        yield Finding("ok", "redis eviction", "noeviction")
    else:
        message = f"maxmemory-policy is {policy}: a full Redis would silently drop jobs"
        advice = "redis-cli CONFIG SET maxmemory-policy noeviction, and in redis.conf"
        yield Finding("bad", "redis eviction", message, advice)
    if info.get("aof_enabled"):
        yield Finding("ok", "redis persistence", "append-only file on")
    else:
        message = "append-only file off: open jobs are lost when Redis restarts"
        advice = "redis-cli CONFIG SET appendonly yes, and in redis.conf"
        yield Finding("warn", "redis persistence", message, advice)


def _redis_memory(info: dict[str, Any]) -> Findings:
    used, most = int(info.get("used_memory", 0)), int(info.get("maxmemory", 0))
    message = f"{used / 2**20:.0f} MiB used"
    if most == 0:
        yield Finding("ok", "redis memory", f"{message}, no limit set")
    elif used > 0.7 * most:
        message = f"{message} of {most / 2**20:.0f} MiB: at 100 % submits raise QueueFull"
        yield Finding("warn", "redis memory", message, "add workers, or raise maxmemory")
    else:
        yield Finding("ok", "redis memory", f"{message} of {most / 2**20:.0f} MiB")


def _skew(check: str, seconds: float) -> Finding:
    message = f"{abs(seconds):.1f} s {'ahead of' if seconds > 0 else 'behind'} this machine's"
    if abs(seconds) > SKEW_BAD_S:
        return Finding("bad", check, message, "run an NTP client on both machines")
    if abs(seconds) > SKEW_WARN_S:
        return Finding("warn", check, message, "run an NTP client on both machines")
    return Finding("ok", check, message)


def _broker(settings: Settings) -> Findings:
    from kombu import Connection

    timeout = max(1, round(settings.timeout_s))
    address = broker_address(settings)
    where = "; ".join(place_of(each) for each in address.url.split(";"))
    with Connection(
        address.url,
        ssl=address.tls,
        connect_timeout=timeout,
        transport_options=address.options,
    ) as connection:
        try:
            connection.ensure_connection(max_retries=1, timeout=timeout)
        except Exception as error:  # each transport has exceptions of its own
            advice = "check BLIPQ_BROKER_URL, and that the transport's library is installed"
            yield Finding("bad", "broker", f"{where} does not answer: {error}", advice)
            return
    yield Finding("ok", "broker", f"{where} answers")


# --- S3 -------------------------------------------------------------------------------------------


def _s3(settings: Settings, *, create_bucket: bool) -> Findings:
    from botocore.exceptions import BotoCoreError

    storage = Storage(settings, read_timeout_s=5)
    credentials = _credentials(settings)
    yield credentials
    if credentials.state == "bad":
        return
    try:
        if create_bucket:
            storage.create_bucket(settings.inbox_bucket)
        yield from _bucket(storage, settings.inbox_bucket)
    except BotoCoreError as error:
        advice = (
            f"start S3 or `{blipq('up')}`, or set BLIPQ_S3_ENDPOINT_URL, BLIPQ_S3_ACCESS_KEY_ID "
            "and BLIPQ_S3_SECRET_ACCESS_KEY"
        )
        yield Finding("bad", "s3", f"it does not answer: {error}", advice)


def _credentials(settings: Settings) -> Finding:
    where = settings.s3_endpoint
    service = place_of(where) if where else "AWS itself (no endpoint is set)"
    if settings.s3_access_key_id:
        return Finding("ok", "s3 credentials", f"from the settings, for {service}")
    import boto3

    found = boto3.session.Session().get_credentials()
    if found is None:
        advice = (
            f"start a local stack with `{blipq('up')}`, or set BLIPQ_S3_ACCESS_KEY_ID and "
            "BLIPQ_S3_SECRET_ACCESS_KEY, or AWS's own variables"
        )
        return Finding("bad", "s3 credentials", f"none, for {service}", advice)
    return Finding("ok", "s3 credentials", f"from AWS's chain ({found.method}), for {service}")


def _bucket(storage: Storage, bucket: str) -> Findings:
    """Writes, reads, and writes again on condition that nothing is there."""
    from botocore.exceptions import ClientError

    probe: dict[str, Any] = {"Bucket": bucket, "Key": PROBE_KEY}
    body = b"written by blipq doctor"
    try:
        response: Any = storage.client.put_object(**probe, Body=body)
    except ClientError as error:
        yield from _refused_write(bucket, error)
        return
    yield Finding("ok", "s3 write", f"bucket {bucket}")
    yield from _s3_clock(response)
    try:
        same = storage.client.get_object(**probe)["Body"].read() == body
    except ClientError as error:
        message = f"bucket {bucket}: {error}"
        yield Finding("warn", "s3 read", message, "fine for a producer; workers need s3:GetObject")
    else:
        other = "other bytes came back than were written"
        state: State = "ok" if same else "bad"
        yield Finding(state, "s3 read", f"bucket {bucket}" if same else other)
    yield _conditional_write(storage, probe, body)


def _refused_write(bucket: str, error: Any) -> Findings:
    code = error.response.get("Error", {}).get("Code", "")
    yield from _s3_clock(error.response)
    if code == "NoSuchBucket" or status_of(error) == 404:
        advice = f"{blipq('doctor --create-bucket')}, or set BLIPQ_INBOX_BUCKET"
        yield Finding("bad", "s3 write", f"there is no bucket {bucket}", advice)
    else:
        advice = f"allow s3:PutObject on {bucket}, and check keys and region"
        yield Finding("bad", "s3 write", f"bucket {bucket}: {error}", advice)


def _s3_clock(response: Any) -> Findings:
    told = response.get("ResponseMetadata", {}).get("HTTPHeaders", {}).get("date")
    if told:
        # The header has whole seconds.
        yield _skew("s3 clock", parsedate_to_datetime(told).timestamp() + 0.5 - time.time())


def _conditional_write(storage: Storage, probe: Any, body: bytes) -> Finding:
    from botocore.exceptions import ClientError

    check = "s3 conditional write"
    try:
        storage.client.put_object(**probe, Body=body, IfNoneMatch="*")
    except ClientError as error:
        if status_of(error) in (409, 412):
            return Finding("ok", check, "an existing object is not written again")
        advice = "uploads need it: take an S3 that has conditional writes"
        return Finding("bad", check, f"If-None-Match is refused: {error}", advice)
    advice = "uploads work, but each writes its object again"
    return Finding("warn", check, "If-None-Match is ignored", advice)


# --- workers and queues ---------------------------------------------------------------------------


def _workers(settings: Settings) -> Findings:
    with connect(settings) as raw:
        live = OperatorLedger(raw, settings).workers().values()
    taking = [worker for worker in live if not worker.get("draining")]
    models = sorted({model for worker in taking for model in worker["models"]})
    for model in models:
        serving = [worker for worker in taking if model in worker["models"]]
        yield _serving(model, serving)
        yield from _decode_bound(model, serving)
        yield _outputs(model, serving)
    if len(taking) < len(live):
        yield Finding("ok", "workers", f"{len(live) - len(taking)} draining")
    if "default" not in models:
        advice = f"start one: BLIPQ_MODELS=default=opt-2.7b {blipq('worker')}"
        yield Finding("warn", "workers", "no live worker serves the model 'default'", advice)


def _serving(model: str, serving: list[dict[str, Any]]) -> Finding:
    """The workers of a model. One with fronts lives on while its model is loaded again."""
    active = sum(worker["active"] for worker in serving)
    fronts = sum(worker.get("fronts", 0) for worker in serving)
    message = f"{len(serving)} live for the model {model!r}, {active} jobs in hand"
    message += f", {fronts} fronts" if fronts else ""
    loading = sum(worker.get("engine") == "starting" for worker in serving)
    if not loading:
        return Finding("ok", "workers", message)
    message = f"{message}; {loading} of them load the model again"
    return Finding("warn", "workers", message, "the log of such a worker says why its engine ended")


def _decode_bound(model: str, serving: list[dict[str, Any]]) -> Findings:
    """Where cores are what is short."""
    bound = sum(bool(worker.get("decode_bound")) for worker in serving)
    if bound:
        message = f"{bound} of {len(serving)} for the model {model!r} wait for images to be decoded"
        advice = "give their hosts more cores, or send smaller images: the model has time to spare"
        yield Finding("warn", "workers", message, advice)


def _outputs(model: str, serving: list[dict[str, Any]]) -> Finding:
    """Where results may be written. Workers of older versions do not say."""
    told = sorted(
        {", ".join(sorted(worker["outputs"])) for worker in serving if "outputs" in worker}
    )
    if len(told) > 1:
        places = " / ".join(each or "nowhere" for each in told)
        advice = "give all workers of a model the same BLIPQ_ALLOWED_OUTPUTS"
        return Finding("warn", "outputs", f"workers of {model!r} differ: {places}", advice)
    if told and told[0]:
        return Finding("ok", "outputs", f"jobs for {model!r} may write to {told[0]}")
    message = f"jobs for {model!r} with an output are refused (BLIPQ_ALLOWED_OUTPUTS names none)"
    return Finding("ok", "outputs", message if told else f"workers of {model!r} do not say")


def _queues(settings: Settings) -> Findings:
    with connect(settings) as raw:
        queues = OperatorLedger(raw, settings).queues()
        dead = raw.zcard(keys.DEAD_LETTERS)
    for state in queues:
        if state.oldest_s is None:
            continue
        message = f"{state.queue}: {state.waiting} waiting, the oldest for {state.oldest_s:.0f} s"
        if state.live_workers:
            yield Finding("ok", "queues", message)
        else:
            purge = blipq(f"queue purge {state.queue}")
            advice = f"start a worker: BLIPQ_MODELS={state.model}=... {blipq('worker')}; "
            advice += f"or cancel what waits: {purge}"
            yield Finding("bad", "queues", f"{message}, and no live worker", advice)
    yield _dead_letters(dead)


def _webhooks(settings: Settings) -> Findings:
    with connect(settings) as raw:
        outbox = Outbox(raw, settings)
        pending, dead, senders = outbox.pending(), outbox.dead(), len(outbox.senders())
    message = f"{pending} events wait, {senders} live senders"
    if pending and not senders:
        advice = f"start one, with BLIPQ_WEBHOOK_SECRETS set: {blipq('webhooks run')}"
        yield Finding("warn", "webhooks", message, advice)
    else:
        yield Finding("ok", "webhooks", message)
    if dead:
        yield Finding("warn", "webhooks", f"{dead} were given up", blipq("webhooks list --dead"))


def _dead_letters(count: int) -> Finding:
    if count:
        message = f"{count} jobs killed their workers again and again"
        return Finding("warn", "dead letters", message, blipq("dead-letters list"))
    return Finding("ok", "dead letters", "none")


# --- this machine as a worker ---------------------------------------------------------------------


def _machine(ask_torch: bool) -> Findings:
    if not has_worker():
        yield Finding("ok", "this machine", "a producer: no worker is installed here")
        return
    yield from _weights()
    gpus = _gpus()
    if gpus is None:
        advice = "a GPU needs NVIDIA's driver; the demo model does without"
        yield Finding(
            "warn", "gpu", "nvidia-smi is not here: a worker would run on the CPU", advice
        )
        return
    yield from gpus
    version = importlib.metadata.version("torch")
    if version.endswith("+cpu"):
        advice = "install the CUDA build: `make clean`, then `make demo TORCH=cuda`"
        yield Finding("bad", "torch", f"torch {version} is built without CUDA", advice)
    elif ask_torch:
        yield _torch_sees_cuda(version)
    else:
        yield Finding("ok", "torch", f"torch {version}; ask it for CUDA with --torch")


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 0.1e9 else f"{count / 1e6:.1f} MB"


def _weights() -> Findings:
    """The weights of BLIPQ_MODELS, and room for those that are not here yet."""
    command = [sys.executable, "-m", "blipq", "models", "weights"]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=60)
    if answer.returncode:
        told = (answer.stderr.strip() or "no answer").splitlines()[-1]
        yield Finding("bad", "weights", told, "correct BLIPQ_MODELS and the other settings")
        return
    told = json.loads(answer.stdout)
    for each in told["weights"]:
        size = "" if each["bytes"] is None else f", {_size(each['bytes'])}"
        if each["present"]:
            yield Finding("ok", "weights", f"{each['checkpoint']}{size}")
    missing = [each for each in told["weights"] if not each["present"]]
    if missing:
        names = ", ".join(each["checkpoint"] for each in missing)
        needed = sum(each["bytes"] or 0 for each in missing)
        full = needed > told["free"]
        message = f"not on this machine: {names}" + (", and the disk is too full" if full else "")
        yield Finding("bad" if full else "warn", "weights", message, told["advice"])


def _gpus() -> Findings | None:
    if shutil.which("nvidia-smi") is None:
        return None
    query = "name,driver_version,memory.total,memory.free"
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits"]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=30)
    return _gpu_findings(answer)


def _gpu_findings(answer: "subprocess.CompletedProcess[str]") -> Findings:
    lines = [line.split(", ") for line in answer.stdout.splitlines() if line.count(", ") == 3]
    if answer.returncode or not lines:
        told = (answer.stderr or answer.stdout or "it lists no GPU").strip().splitlines()[0]
        yield Finding("bad", "gpu", f"nvidia-smi: {told}", "install NVIDIA's driver, or reboot")
    for name, driver, total, free in lines:
        message = f"{name}, driver {driver}, {free} of {total} MiB free"
        yield Finding("ok", "gpu", message)


def _torch_sees_cuda(version: str) -> Finding:
    code = "import torch; print(torch.cuda.is_available(), torch.version.cuda)"
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120
    )
    if answer.stdout.startswith("True"):
        return Finding("ok", "torch", f"torch {version} sees CUDA {answer.stdout.split()[1]}")
    advice = "the driver is older than this build of torch, or CUDA_VISIBLE_DEVICES hides the GPU"
    return Finding("bad", "torch", f"torch {version} sees no CUDA", advice)


# --- the canary -----------------------------------------------------------------------------------


def _canary(settings: Settings) -> Findings:
    started = time.monotonic()
    with Client(settings) as client:
        job = client.caption(red_square(), expires_in=CANARY_TIMEOUT_S, priority="high")
        try:
            text = job.result(timeout=CANARY_TIMEOUT_S).text
        except ResultTimeout as error:
            job.cancel()
            advice = f"look at the workers' logs; `{blipq('status')}` says where a job is"
            yield Finding("bad", "canary", str(error), advice)
        except BlipqError as error:
            advice = "docs/troubleshooting.md goes through the codes"
            yield Finding("bad", "canary", str(error), advice)
        else:
            took = time.monotonic() - started
            receipt = job.info().receipt
            yield _judged(text, receipt.checkpoint if receipt else None, took)


def _judged(text: str, checkpoint: str | None, took: float) -> Finding:
    """A model may call a red square something else; the demo model, trained on such, may not."""
    missing = [word for word in ("red", "square") if word not in text.lower().split()]
    message = f"a job took {took:.1f} s (contract {CONTRACT}): of a red square it says {text!r}"
    if not text.strip() or (missing and checkpoint == "demo"):
        advice = "the model is damaged: fetch its weights again, and look at the worker's log"
        return Finding("bad", "canary", message, advice)
    if len(missing) == 2:
        advice = "fine if the model was trained for other pictures; else compare with other weights"
        return Finding("warn", "canary", message, advice)
    return Finding("ok", "canary", message)
