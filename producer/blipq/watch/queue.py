"""An SQS queue of S3 notifications."""

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from blipq.errors import QueueUnavailable
from blipq.s3.boto import boto_client
from blipq.s3.refusals import FOR_NOW, S3Refused, S3Unavailable, refusal_of
from blipq.settings import Settings
from blipq.watch.events import Notification, Unreadable, read
from blipq.watch.sources import Batch, Found

if TYPE_CHECKING:
    from mypy_boto3_sqs import SQSClient

log = logging.getLogger(__name__)

MOST_MESSAGES = 10
#: A long poll: the queue answers at once when there is something.
WAIT_S = 10


@dataclass
class Messages(Batch):
    """Up to ten messages. One that is not deleted comes again when its visibility ends."""

    queue: "Queue" = field(kw_only=True)
    by_receipt: dict[str, list[Notification]] = field(kw_only=True)

    def hold(self) -> None:
        """Keeps the messages invisible to others."""
        self.queue.show_after(list(self.by_receipt), self.queue.visibility_s)

    def done(self, refused: set[Found]) -> None:
        """Deletes the messages; one with an upload that is refused goes the way of poison."""
        self.queue.let_go(list(self.by_receipt))
        self.queue.delete(
            [receipt for receipt, found in self.by_receipt.items() if refused.isdisjoint(found)]
        )


class Queue:
    """Receives messages and deletes them when their uploads are recorded.

    What cannot be read is left to the queue's redrive policy: it may be an upload after all.
    """

    pause_s = 0.0

    def __init__(
        self, url: str, settings: Settings, *, visibility_s: float, wait_s: int = WAIT_S
    ) -> None:
        self.url = url
        self.visibility_s = visibility_s
        self._settings = settings
        self._wait_s = wait_s
        self._held: set[str] = set()

    @cached_property
    def client(self) -> "SQSClient":
        """The boto3 client. The address of SQS is in the queue's URL."""
        from botocore.config import Config

        place = urlsplit(self.url)
        region = re.match(r"sqs\.([a-z0-9-]+)\.", place.netloc)
        secret = self._settings.s3_secret_access_key
        client: SQSClient = boto_client(
            "sqs",
            endpoint_url=f"{place.scheme}://{place.netloc}",
            aws_access_key_id=self._settings.s3_access_key_id,
            aws_secret_access_key=secret.get_secret_value() if secret else None,
            region_name=region[1] if region else self._settings.s3_region or "us-east-1",
            config=Config(
                connect_timeout=3,
                read_timeout=self._wait_s + 5,
                retries={"mode": "standard", "total_max_attempts": 2},
            ),
        )
        return client

    def next(self) -> Batch | None:
        """Up to ten messages, or None after a long poll without any."""
        with _sqs_errors():
            answer = self.client.receive_message(
                QueueUrl=self.url,
                MaxNumberOfMessages=MOST_MESSAGES,
                WaitTimeSeconds=self._wait_s,
                VisibilityTimeout=round(self.visibility_s),
            )
        by_receipt: dict[str, list[Notification]] = {}
        for message in answer.get("Messages", ()):
            try:
                by_receipt[message["ReceiptHandle"]] = read(message["Body"])
            except Unreadable as error:
                log.error("message %s is left in the queue: %s", message["MessageId"], error)
        self._held.update(by_receipt)
        if not answer.get("Messages"):
            return None
        found: list[Found] = [upload for uploads in by_receipt.values() for upload in uploads]
        return Messages(found, queue=self, by_receipt=by_receipt)

    def delete(self, receipts: list[str]) -> None:
        """Removes messages for good. One that stays is found recorded next time."""
        if not receipts:
            return
        entries = [{"Id": str(n), "ReceiptHandle": each} for n, each in enumerate(receipts)]
        with suppress(QueueUnavailable), _sqs_errors():
            self.client.delete_message_batch(QueueUrl=self.url, Entries=entries)  # type: ignore[arg-type]

    def let_go(self, receipts: list[str]) -> None:
        """These are not given back by ``close``."""
        self._held.difference_update(receipts)

    def show_after(self, receipts: list[str], seconds: float) -> None:
        """Makes messages visible to others after so many seconds."""
        if not receipts:
            return
        entries = [
            {"Id": str(n), "ReceiptHandle": each, "VisibilityTimeout": round(seconds)}
            for n, each in enumerate(receipts)
        ]
        with suppress(QueueUnavailable), _sqs_errors():
            self.client.change_message_visibility_batch(QueueUrl=self.url, Entries=entries)  # type: ignore[arg-type]

    def close(self) -> None:
        """Shows what is not done to others at once."""
        held = sorted(self._held)
        for start in range(0, len(held), MOST_MESSAGES):
            self.show_after(held[start : start + MOST_MESSAGES], 0)


@contextmanager
def _sqs_errors() -> Iterator[None]:
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except (ClientError, BotoCoreError) as error:
        refusal = refusal_of(error)
        if refusal in FOR_NOW:
            raise S3Unavailable(f"SQS does not answer: {error}", refusal) from error
        raise S3Refused(f"SQS refuses: {error}", refusal) from error
