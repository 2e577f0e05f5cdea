"""A receiver of blipq's webhooks: pip install standardwebhooks; python receiver.py [PORT]."""

import os
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from standardwebhooks import Webhook, WebhookVerificationError

webhook = Webhook(os.environ["WEBHOOK_SECRET"])
seen: set[str] = set()  # in a real service, a table with a unique column


class Receiver(BaseHTTPRequestHandler):
    """Verifies before it believes, and takes each event once."""

    def do_POST(self) -> None:
        """One event."""
        # The signature covers these very bytes: verify before parsing, and never re-encode.
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        try:
            event = webhook.verify(body, dict(self.headers))
        except WebhookVerificationError as error:
            return self._answer(401, str(error))
        id = self.headers["webhook-id"]
        if id not in seen:
            handle(event)  # quickly, or put it into a queue of your own: 15 s are all there is
            seen.add(id)
        return self._answer(204)

    def _answer(self, status: int, text: str = "") -> None:
        self.send_response(status)
        self.send_header("content-length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())


def handle(event: dict) -> None:
    """What your service does with an outcome."""
    job = event["data"]
    print(event["type"], job.get("id"), job.get("result") or job.get("error"), flush=True)


if __name__ == "__main__":
    port = int(sys.argv[1]) if len(sys.argv) > 1 else 8000
    ThreadingHTTPServer(("127.0.0.1", port), Receiver).serve_forever()
