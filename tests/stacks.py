"""The local stack as tests start it; on demand with RabbitMQ or SQS for its messages.

``TEST_BROKER=rabbitmq`` takes Debian's ``rabbitmq-server``, running on this machine, and
``rabbitmqctl``, which wants root. Each stack has a virtual host of its own. ``TEST_BROKER=sqs``
takes moto's server.
"""

import os
import subprocess
from pathlib import Path
from uuid import uuid4

from blipq.local.stack import LocalStack

BROKER = os.environ.get("TEST_BROKER", "redis")


class RabbitStack(LocalStack):
    """Redis, S3 and a virtual host of RabbitMQ."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.virtual_host = f"blipq-{uuid4().hex}"

    def start(self) -> None:
        super().start()
        rabbitmqctl("add_vhost", self.virtual_host)
        rabbitmqctl("set_permissions", "-p", self.virtual_host, "guest", ".*", ".*", ".*")

    def stop(self) -> None:
        rabbitmqctl("delete_vhost", self.virtual_host)
        super().stop()

    def settings_fields(self) -> dict[str, str]:
        broker = f"amqp://guest:guest@127.0.0.1:5672/{self.virtual_host}"
        return super().settings_fields() | {"broker_url": broker}


class SqsStack(LocalStack):
    """Redis, S3 and a server that speaks SQS."""

    def __init__(self, folder: Path) -> None:
        from sqs import Sqs  # which waits as conftest does, and conftest starts a stack

        super().__init__(folder)
        self.sqs = Sqs()

    def start(self) -> None:
        super().start()
        self.sqs.start()

    def stop(self) -> None:
        self.sqs.stop()
        super().stop()

    def settings_fields(self) -> dict[str, str]:
        broker = f"sqs://test:test@{self.sqs.url.partition('//')[2]}"
        return super().settings_fields() | {"broker_url": broker}

    def put(self, queue: str, body: bytes) -> None:
        """A message that no Celery client would send: SQS has no dots in the names of queues."""
        url = self.sqs.client.get_queue_url(QueueName=queue.replace(".", "-"))["QueueUrl"]
        self.sqs.send(url, body.decode())

    def left(self) -> int:
        """Messages that wait, or that a worker has in hand."""
        urls = self.sqs.client.list_queues()["QueueUrls"]
        return sum(sum(self.sqs.count(url)) for url in urls)


def rabbitmqctl(*arguments: str) -> None:
    subprocess.run(["rabbitmqctl", "--quiet", *arguments], check=True, timeout=60)


def local_stack(folder: Path) -> LocalStack:
    """A stack in the folder, not started."""
    stacks = {"redis": LocalStack, "rabbitmq": RabbitStack, "sqs": SqsStack}
    return stacks[BROKER](folder)
