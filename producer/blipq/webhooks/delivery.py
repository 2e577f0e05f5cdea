"""What is sent: the body of an event, its signature, and when to try again."""

import base64
import hashlib
import hmac
import json
import random
import secrets as random_bytes
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Literal

from blipq.ledger.codec import job_info
from blipq.s3.refusals import S3Refused, S3Unavailable
from blipq.s3.storage import Storage

if TYPE_CHECKING:
    from blipq.webhooks.response import Answer

#: Larger bodies carry a pointer to the result instead of the result.
MAX_BODY_BYTES = 20_000
#: The longest that S3 signs for. The ladder is shorter, and the bytes are the same on each attempt.
RESULT_URL_S = 7 * 86400

Verdict = Literal["delivered", "retry", "dead", "stop", "defer"]


def webhook_id(event: str) -> str:
    """The id by which a receiver recognizes repetitions: the same however often an event is sent.

    A digest, because the id of a job may hold characters that no header may.
    """
    return "msg_" + hashlib.sha256(event.encode()).hexdigest()[:32]


def body_of(record: Mapping[str, str], job: Mapping[str, str], storage: Storage) -> bytes:
    """The body of an event, as it is sent on every attempt.

    ``record`` is the event's, ``job`` the job's fields as they were then.
    """
    info = job_info(record["id"], job)
    data = info.model_dump(mode="json", exclude_none=True)
    if info.result_uri is not None:
        data |= _presigned(info.result_uri, storage)
    body = _encoded(record, data)
    if len(body) <= MAX_BODY_BYTES or "result" not in data:
        return body
    del data["result"]
    return _encoded(record, data | _pointer(record["id"], job, storage))


def _encoded(record: Mapping[str, str], data: Mapping[str, Any]) -> bytes:
    event = {"type": record["type"], "timestamp": _told(float(record["at"]) / 1000), "data": data}
    return json.dumps(event, ensure_ascii=False, separators=(",", ":")).encode()


def _pointer(id: str, job: Mapping[str, str], storage: Storage) -> dict[str, str]:
    """Where the result is that was too large to send."""
    if uri := job.get("output"):
        return {"result_uri": uri, **_presigned(uri, storage)}
    return {"result_omitted": f"larger than {MAX_BODY_BYTES} bytes: blipq result {id}"}


def _presigned(uri: str, storage: Storage) -> dict[str, str]:
    try:
        return {"result_url": storage.presign(uri, expires_in=RESULT_URL_S)}
    except (S3Refused, S3Unavailable):  # no credentials here; a receiver may have its own
        return {}


def _told(seconds: float) -> str:
    text = datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")
    return text.replace("+00:00", "Z")


def trial_body(now: datetime) -> bytes:
    """The body of an event that no job stands behind."""
    record = {"type": "blipq.test", "at": str(now.timestamp() * 1000)}
    return _encoded(record, {"message": "blipq webhooks test"})


def signed_headers(
    id: str, body: bytes, secrets: Sequence[str], *, now: datetime | None = None
) -> dict[str, str]:
    """The headers of one attempt, signed with every secret, so that receivers can change over.

    ``secrets`` must not be empty: nothing is ever sent unsigned.
    """
    from standardwebhooks import Webhook

    if not secrets:
        raise ValueError("no secret to sign with")
    now = now or datetime.now(UTC)
    text = body.decode()
    signatures = (Webhook(secret).sign(id, now, text) for secret in secrets)
    return {
        "content-type": "application/json",
        "webhook-id": id,
        "webhook-timestamp": str(int(now.timestamp())),
        "webhook-signature": " ".join(signatures),
    }


def new_secret() -> str:
    """A secret for BLIPQ_WEBHOOK_SECRETS."""
    return "whsec_" + base64.b64encode(random_bytes.token_bytes(32)).decode()


def tenant_secret(secret: str, tenant: str) -> str:
    """A tenant's own secret, which is derived from one of the deployment's.

    No event's signature equals it: what is signed there ends with an object in JSON.
    """
    key = base64.b64decode(secret.removeprefix("whsec_"))
    derived = hmac.digest(key, f"blipq tenant {tenant}".encode(), "sha256")
    return "whsec_" + base64.b64encode(derived).decode()


def secrets_for(tenant: str | None, secrets: Sequence[str]) -> list[str]:
    """What signs an event: of a tenant's its own secrets, and those of the deployment."""
    own = [] if tenant is None else [tenant_secret(each, tenant) for each in secrets]
    return [*own, *secrets]


def verdict_on(
    answer: "Answer", attempts: int, ladder: Sequence[float], *, jitter: float | None = None
) -> tuple[Verdict, float]:
    """What follows from an answer to attempt number ``attempts``, and after how many seconds.

    Jitter spreads the retries of events that failed together over another fifth of the pause.
    """
    if answer.outcome == "delivered":
        return "delivered", 0.0
    if answer.outcome == "gone":
        return "stop", 0.0
    if answer.final or attempts >= len(ladder):
        return "dead", 0.0
    spread = random.uniform(1.0, 1.2) if jitter is None else jitter
    return "retry", max(ladder[attempts] * spread, answer.retry_after)
