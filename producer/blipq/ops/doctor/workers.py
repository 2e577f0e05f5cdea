"""Live workers, and the jobs and webhooks that wait for a process to take them."""

from collections import Counter
from typing import Any

from blipq.contract import CONTRACT
from blipq.ledger import keys
from blipq.ledger.connection import connect
from blipq.ledger.operator import OperatorLedger
from blipq.ops.doctor.findings import Finding, Findings
from blipq.program import blipq
from blipq.settings import Settings
from blipq.webhooks.outbox import Outbox


def check_workers(settings: Settings) -> Findings:
    with connect(settings) as raw:
        live = OperatorLedger(raw, settings).workers().values()
    taking = [worker for worker in live if not worker.get("draining")]
    models = sorted({model for worker in taking for model in worker["models"]})
    for model in models:
        serving = [worker for worker in taking if model in worker["models"]]
        yield _serving(model, serving)
        yield from _decode_bound(model, serving)
        yield from _decoding(model, serving)
        yield _outputs(model, serving)
        yield from _contracts(model, serving)
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
    return Finding("warn", "workers", message, "such a worker's log has why its engine ended")


def _decode_bound(model: str, serving: list[dict[str, Any]]) -> Findings:
    """Where cores are what is short."""
    bound = sum(bool(worker.get("decode_bound")) for worker in serving)
    if bound:
        message = f"{bound} of {len(serving)} for the model {model!r} wait for images to be decoded"
        advice = "give their hosts more cores, or send smaller images: the model has time to spare"
        yield Finding("warn", "workers", message, advice)


def _decoding(model: str, serving: list[dict[str, Any]]) -> Findings:
    """How texts are written: on a GPU, launches one by one take longer than what they compute."""
    ways = Counter(
        worker["decoding"][model] for worker in serving if model in worker.get("decoding", {})
    )
    for way, count in sorted(ways.items()):
        message = f"{count} of {len(serving)} for the model {model!r} write by {way}"
        if " on cuda" in way and "in graphs" not in way:
            advice = "steps go without CUDA graphs: the reason is in the worker's log, at its start"
            yield Finding("warn", "workers", message, advice)
        else:
            yield Finding("ok", "workers", message)


def _outputs(model: str, serving: list[dict[str, Any]]) -> Finding:
    """Where results may be written. Workers of older versions do not report it."""
    places = sorted(
        {", ".join(sorted(worker["outputs"])) for worker in serving if "outputs" in worker}
    )
    if len(places) > 1:
        listed = " / ".join(each or "nowhere" for each in places)
        advice = "give all workers of a model the same BLIPQ_ALLOWED_OUTPUTS"
        return Finding("warn", "outputs", f"workers of {model!r} differ: {listed}", advice)
    if places and places[0]:
        return Finding("ok", "outputs", f"jobs for {model!r} may write to {places[0]}")
    message = f"jobs for {model!r} with an output are refused (BLIPQ_ALLOWED_OUTPUTS names none)"
    return Finding("ok", "outputs", message if places else f"workers of {model!r} do not say")


def _contracts(model: str, serving: list[dict[str, Any]]) -> Findings:
    """Whether workers of an earlier contract serve the model. Those of contract 1 do not say."""
    earlier = sum(worker.get("contract", 1) < CONTRACT for worker in serving)
    if earlier:
        message = f"{earlier} of {len(serving)} for the model {model!r} lack contract {CONTRACT}"
        message += ": they leave jobs that need it in the queue"
        yield Finding("warn", "workers", message, "deploy this version to them, too")


def check_queues(settings: Settings) -> Findings:
    with connect(settings) as raw:
        queues = OperatorLedger(raw, settings).queues()
        dead = raw.zcard(keys.DEAD_LETTERS)
    for state in queues:
        if state.oldest_s is None:
            continue
        message = f"{state.queue}: {state.waiting} waiting, the oldest for {state.oldest_s:.0f} s"
        if state.paused:
            advice = f"when they are to run: {blipq(f'queue resume {state.queue}')}"
            yield Finding("warn", "queues", f"{message}, and it is paused", advice)
        elif state.live_workers:
            yield Finding("ok", "queues", message)
        else:
            purge = blipq(f"queue purge {state.queue}")
            advice = f"start a worker: BLIPQ_MODELS={state.model}=... {blipq('worker')}; "
            advice += f"or cancel what waits: {purge}"
            yield Finding("bad", "queues", f"{message}, and no live worker", advice)
    yield _dead_letters(dead)


def check_webhooks(settings: Settings) -> Findings:
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
