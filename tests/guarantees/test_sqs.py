"""SQS carries the messages, as moto's server speaks it; the ledger stays in Redis."""

from pathlib import Path

from conftest import wait_until
from guarantees.rig import Rig
from stacks import SqsStack

QUEUE = "blipq.default.normal"


def test_jobs_of_every_kind_end_over_sqs_beside_what_is_no_message(tmp_path: Path) -> None:
    stack = SqsStack(tmp_path / "stack")
    rig = Rig(tmp_path, stack=stack)
    try:
        worker = rig.start_demo_worker()
        client, image = rig.client, rig.image
        for junk in (b"not a message", b"[]", b'{"properties": {}}'):
            rig.put(QUEUE, junk)
        jobs = [
            client.caption(image, priority="high"),
            client.vqa(image, "what color is it?", priority="low"),
            client.match(image, "a circle"),
            client.describe(image, texts="a circle"),
            client.embed(image, index="pictures"),
        ]
        rig.all_succeed(jobs)
        rig.all_succeed([client.search("pictures", image=image)])
        wait_until(lambda: stack.left() == 0, "the messages to be deleted")
        assert worker.exit_code is None
        assert rig.keys_without_ttl() == []
    finally:
        rig.close()
