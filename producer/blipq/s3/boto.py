"""Clients of boto3, which is imported at the first use."""

from typing import Any

from blipq.redaction import redacted
from blipq.s3.refusals import Refusal, S3Refused
from blipq.settings import checked_endpoint_url

_REDIRECTS = (301, 302, 307)


def boto_client(service: Any, **options: Any) -> Any:
    """A client of a service, with AWS's own configuration where the options name none.

    Raises S3Refused where that configuration cannot be right, whatever the service answers, and
    botocore's exceptions where credentials are not to be had.
    """
    import boto3
    from botocore import exceptions as botocore

    try:
        client = boto3.session.Session().client(service, **options)
        checked_endpoint_url(client.meta.endpoint_url)
    except (
        botocore.NoCredentialsError,
        botocore.PartialCredentialsError,
        botocore.CredentialRetrievalError,
        botocore.TokenRetrievalError,
        botocore.SSOError,
        botocore.ConnectionError,
        botocore.HTTPClientError,
    ):
        raise  # another day they may be there
    except (ValueError, botocore.BotoCoreError) as error:
        message = f"{service} is configured wrongly: {redacted(str(error))}"
        raise S3Refused(message, Refusal.ACCESS) from None
    if service == "s3":
        client.meta.events.register_first("needs-retry.s3", _take_for_refusal)
    return client


def _take_for_refusal(request_dict: Any, response: Any, **_: Any) -> None:
    """Lets a redirect that names no region, as a proxy's to https, be an error like another.

    S3 names the bucket's region where it redirects, and botocore goes there. For a redirect without
    one botocore sends a HEAD to the bucket, which is redirected too, until the stack overflows.
    """
    if response is None or response[0].status_code not in _REDIRECTS:
        return
    answer = response[1]
    headers = answer.get("ResponseMetadata", {}).get("HTTPHeaders", {})
    if "x-amz-bucket-region" not in headers and "Region" not in answer.get("Error", {}):
        request_dict["context"].setdefault("s3_redirect", {})["redirected"] = True
