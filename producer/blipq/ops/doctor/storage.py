"""S3: credentials, and whether the inbox bucket can be written and read."""

import time
from email.utils import parsedate_to_datetime
from typing import Any

from blipq.ops.doctor.findings import Finding, Findings, State, skew
from blipq.program import blipq
from blipq.redaction import place_of
from blipq.s3.refusals import status_of
from blipq.s3.storage import Storage
from blipq.settings import Settings

#: An object in the inbox that the checks write; always the same, so that nothing piles up.
PROBE_KEY = "blipq-doctor"


def check_s3(settings: Settings, *, create_bucket: bool) -> Findings:
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
    date = response.get("ResponseMetadata", {}).get("HTTPHeaders", {}).get("date")
    if date:
        # The header has whole seconds.
        yield skew("s3 clock", parsedate_to_datetime(date).timestamp() + 0.5 - time.time())


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
