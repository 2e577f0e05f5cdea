"""Every name in blipq's traces: spans, attributes, and the version of the conventions they follow.

Attributes that begin with ``messaging.``, ``http.``, ``server.`` and ``error.`` are those of
OpenTelemetry's semantic conventions; what these have no name for begins with ``blipq.``.
"""

from typing import Literal

SCHEMA_URL = "https://opentelemetry.io/schemas/1.44.0"
SCOPE = "blipq"

# Spans. Those about a queue have its name behind this one.
SUBMIT, PROCESS = "submit", "process"
QUEUE, MODEL, PASS, FINISH, WEBHOOK = "queue", "model", "pass", "finish", "webhook"

SYSTEM = "messaging.system"
OPERATION = "messaging.operation.name"
OPERATION_TYPE = "messaging.operation.type"
DESTINATION = "messaging.destination.name"
MESSAGE_ID = "messaging.message.id"
BATCH_SIZE = "messaging.batch.message_count"

HTTP_METHOD = "http.request.method"
SERVER = "server.address"
ERROR_TYPE = "error.type"

KIND = "blipq.kind"
MODEL_NAME = "blipq.model"
ATTEMPT = "blipq.attempt"
WORKER = "blipq.worker"
OUTCOME = "blipq.outcome"
SHARED = "blipq.shared"
EVENT = "blipq.event"

Operation = Literal["send", "process"]
Attributes = dict[str, str | int | float | bool]


def of_message(name: str, operation: Operation, queue: str, id: str, kind: str) -> Attributes:
    """The attributes of a span about a job's message, whose id is the job's."""
    return {
        SYSTEM: "blipq",
        OPERATION: name,
        OPERATION_TYPE: operation,
        DESTINATION: queue,
        MESSAGE_ID: id,
        KIND: kind,
    }
