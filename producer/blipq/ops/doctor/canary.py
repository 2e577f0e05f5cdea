"""The canary: a real job, on a live worker."""

import time

from blipq.client.sync_client import Client
from blipq.errors import BlipqError, ResultTimeout
from blipq.local.sample import red_square
from blipq.ops.doctor.findings import Finding, Findings
from blipq.program import blipq
from blipq.settings import Settings

CANARY_TIMEOUT_S = 30.0


def check_canary(settings: Settings) -> Findings:
    started = time.monotonic()
    with Client(settings) as client:
        job = client.caption(red_square(), expires_in=CANARY_TIMEOUT_S, priority="high")
        try:
            text = job.result(timeout=CANARY_TIMEOUT_S).text
        except ResultTimeout as error:
            job.cancel()
            advice = f"look at the workers' logs; `{blipq('status')}` shows where a job is"
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
    message = f"a job took {took:.1f} s: the caption of a red square is {text!r}"
    if not text.strip() or (missing and checkpoint == "demo"):
        advice = "the model is damaged: fetch its weights again, and look at the worker's log"
        return Finding("bad", "canary", message, advice)
    if len(missing) == 2:
        advice = "fine if the model was trained for other pictures; else compare with other weights"
        return Finding("warn", "canary", message, advice)
    return Finding("ok", "canary", message)
