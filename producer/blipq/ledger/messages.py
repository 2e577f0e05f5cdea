"""The Celery message of a job: what kombu sends, and what it puts into the list of a Redis queue.

docs/other-languages.md has its fields.
"""

import base64
import json
import uuid

from blipq.contract import CONTRACT, Kind
from blipq.ledger.keys import task_name


def headers_of(kind: Kind, id: str) -> dict[str, str | int]:
    """The headers of task messages, protocol 2, with no more in them than workers need."""
    return {"lang": "py", "task": task_name(kind), "id": id, "contract": CONTRACT}


def listed(kind: Kind, id: str, queue: str) -> str:
    """A message as kombu puts it into a Redis list."""
    body = json.dumps([[id], {}, {}]).encode()
    return json.dumps(
        {
            "body": base64.b64encode(body).decode(),
            "content-encoding": "utf-8",
            "content-type": "application/json",
            "headers": headers_of(kind, id),
            "properties": {
                "correlation_id": id,
                "delivery_mode": 2,
                "delivery_info": {"exchange": "", "routing_key": queue},
                "priority": 0,
                "body_encoding": "base64",
                "delivery_tag": str(uuid.uuid4()),
            },
        }
    )
