"""How other programs reach the services: boto3, the AWS CLI, redis-cli, Celery, Flower, Node.js.

What is shown here holds passwords, and is shown only on request.
"""

import os
import shlex

from blipq.errors import InvalidRequest
from blipq.program import blipq
from blipq.s3.outputs import LOCAL_BUCKET
from blipq.s3.outputs import VARIABLE as ALLOWED_OUTPUTS
from blipq.settings import CONNECTION_FIELDS, Settings
from blipq.transport.broker import broker_address

#: Variables that go with the keys of another account, or take their place: a session token makes S3
#: refuse the keys beside it.
OF_OTHER_KEYS = ("AWS_SESSION_TOKEN", "AWS_SECURITY_TOKEN", "AWS_PROFILE", "AWS_DEFAULT_PROFILE")


def exports(settings: Settings) -> dict[str, str]:
    """Variables for the environment of a program. Raises InvalidRequest if no service is named."""
    named = set(CONNECTION_FIELDS) & settings.model_fields_set
    if not named:
        raise InvalidRequest(
            f"no service is named: start a local stack with {blipq('up')}, or set BLIPQ_REDIS_URL"
        )
    values = {name: getattr(settings, name) for name in CONNECTION_FIELDS}
    secret = settings.s3_secret_access_key
    values["s3_secret_access_key"] = secret and secret.get_secret_value()
    found = {f"BLIPQ_{name.upper()}": value for name, value in values.items()}
    found |= {
        "AWS_ENDPOINT_URL_S3": values["s3_endpoint_url"],
        "AWS_ACCESS_KEY_ID": values["s3_access_key_id"],
        "AWS_SECRET_ACCESS_KEY": values["s3_secret_access_key"],
        "AWS_DEFAULT_REGION": settings.s3_region or (values["s3_endpoint_url"] and "us-east-1"),
    }
    # A worker of one's own on a local stack writes where the stack's own one does.
    local = LOCAL_BUCKET if settings.endpoint_source == "local stack" else None
    found[ALLOWED_OUTPUTS] = os.environ.get(ALLOWED_OUTPUTS, local)
    address = broker_address(settings)
    if not address.tls and "master_name" not in address.options:  # else a URL is not enough
        found["CELERY_BROKER_URL"] = address.url
    return {name: value for name, value in found.items() if value}


def as_shell(variables: dict[str, str]) -> str:
    """``export`` lines for ``eval`` in a shell."""
    lines = [f"export {name}={shlex.quote(text)}" for name, text in variables.items()]
    if "AWS_ACCESS_KEY_ID" in variables:
        lines.insert(0, f"unset {' '.join(OF_OTHER_KEYS)}")
    return "\n".join(lines)
