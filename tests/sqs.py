"""SQS as moto's server speaks it over HTTP."""

import itertools
import json
import os
import sys
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import quote_plus

import boto3

from blipq.local.stack import free_port
from blipq.local.supervisor import Service
from conftest import wait_until

_NUMBERS = itertools.count()


class Sqs:
    """A server in a process of its own, and what a bucket with notifications would send."""

    def __init__(self) -> None:
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        command = [sys.executable, "-m", "moto.server", "--host", "127.0.0.1", "--port", str(port)]
        self._service = Service("sqs", command, log=Path(os.devnull))
        self.client: Any = boto3.client(
            "sqs",
            endpoint_url=self.url,
            region_name="us-east-1",
            aws_access_key_id="test",
            aws_secret_access_key="test",
        )

    def start(self) -> None:
        self._service.start()
        wait_until(self._answers, "SQS", timeout=60)

    def stop(self) -> None:
        self._service.stop()

    def __enter__(self) -> "Sqs":
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def _answers(self) -> bool:
        try:
            self.client.list_queues()
        except Exception:
            return False
        return True

    def create(self) -> str:
        """A new queue's URL."""
        answer = self.client.create_queue(QueueName=f"uploads-{os.getpid()}-{next(_NUMBERS)}")
        url: str = answer["QueueUrl"]
        return url

    def send(self, queue: str, body: str) -> None:
        self.client.send_message(QueueUrl=queue, MessageBody=body)

    def tell(self, queue: str, bucket: str, *keys: str) -> None:
        """Says that objects were put, as S3 does."""
        self.send(queue, notification(bucket, *keys))

    def count(self, queue: str) -> tuple[int, int]:
        """Messages that are visible, and messages that somebody holds."""
        names = ["ApproximateNumberOfMessages", "ApproximateNumberOfMessagesNotVisible"]
        found = self.client.get_queue_attributes(QueueUrl=queue, AttributeNames=names)
        visible, held = (int(found["Attributes"][name]) for name in names)
        return visible, held


def notification(bucket: str, *keys: str) -> str:
    """A message of S3 that objects were put."""
    records = [
        {
            "eventVersion": "2.1",
            "eventSource": "aws:s3",
            "eventName": "ObjectCreated:Put",
            "s3": {"bucket": {"name": bucket}, "object": {"key": quote_plus(key)}},
        }
        for key in keys
    ]
    return json.dumps({"Records": records})
