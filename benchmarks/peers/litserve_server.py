"""LitServe: dynamic batching behind HTTP, asked by many clients at once."""

import json
import os
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import litserve
from common import CLIENTS, Model, tell, timed


class Blip2(litserve.LitAPI):
    def setup(self, device):
        self.model = Model()

    def decode_request(self, request):
        return request

    def batch(self, inputs):
        return inputs

    def predict(self, batch):
        return self.model.answer(batch)

    def unbatch(self, output):
        return output

    def encode_response(self, output):
        return {"text": output}


def serve(size: int, port: int) -> None:
    api = Blip2(max_batch_size=size, batch_timeout=0.05)
    server = litserve.LitServer(api, accelerator="cpu", timeout=600)
    server.run(port=port, generate_client_file=False, log_level="error")


def ask(port: int, request: dict) -> str:
    url = f"http://127.0.0.1:{port}/predict"
    call = urllib.request.Request(
        url, json.dumps(request).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(call, timeout=600) as answer:
        return json.loads(answer.read())["text"]


def measured(size: int, port: int) -> dict[str, float]:
    server = subprocess.Popen(
        [sys.executable, __file__, str(size), str(port)],
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as told:
                    if told.status == 200:
                        break
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.2)
        with ThreadPoolExecutor(max(CLIENTS, 2 * size)) as clients:
            return timed(lambda work: list(clients.map(lambda each: ask(port, each), work)))
    finally:
        os.killpg(server.pid, 9)  # told to stop, it sometimes waits for its own threads for ever
        server.wait()


if __name__ == "__main__":
    if len(sys.argv) > 1:
        serve(int(sys.argv[1]), int(sys.argv[2]))
    else:
        from common import job

        ports = iter(job()["ports"])
        sizes = job()["batches"]
        tell({f"max_batch_size {size}": measured(size, next(ports)) for size in sizes})
