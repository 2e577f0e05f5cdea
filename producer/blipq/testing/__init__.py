"""blipq without Redis, S3 and workers, for services' own tests.

    fake = FakeBlipq()
    fake.answer("caption", CaptionResult(captions=(Caption(text="a cat"),)))
    with Client(backend=fake) as client:
        assert client.caption(b"...").result(timeout=1).text == "a cat"

Both clients take it. Requests and options are checked, ids, statuses, idempotency, deadlines and
errors are those of the real service, and blipq's own tests run the same scenarios on both. There
are no retries, webhooks and retention here, and nothing is sent anywhere.
"""

from blipq.testing.fake import Answer, FakeBlipq

__all__ = ["Answer", "FakeBlipq"]
