"""celery-batches: tasks that are flushed together, a solo pool, results in Redis."""

import json
import os
import subprocess
import sys
from functools import cache

from celery import Celery
from celery_batches import Batches
from common import Model, celery_worker, job, tell, timed

SIZE = int(os.environ.get("PEER_BATCH", "1"))

app = Celery("celery_batched", broker=job()["redis"], backend=job()["redis"])
app.conf.update(worker_prefetch_multiplier=4 * SIZE, task_default_queue=f"peer-batches-{SIZE}")


@cache
def model() -> Model:
    return Model()


@app.task(base=Batches, flush_every=SIZE, flush_interval=0.1)
def answer(requests):
    texts = model().answer([request.args[0] for request in requests])
    for request, text in zip(requests, texts, strict=True):
        app.backend.mark_as_done(request.id, text, request)


def run(work):
    results = [answer.delay(request) for request in work]
    return [result.get(timeout=600) for result in results]


def measured() -> dict[str, float]:
    worker = celery_worker("celery_batched")
    try:
        import celery_batched

        return timed(celery_batched.run)
    finally:
        worker.terminate()
        worker.wait()


if __name__ == "__main__":
    if "PEER_BATCH" in os.environ:
        print(json.dumps(measured()))
    else:
        found = {}
        for size in job()["batches"]:
            environment = {**os.environ, "PEER_BATCH": str(size)}
            ran = subprocess.run(
                [sys.executable, __file__], env=environment, stdout=subprocess.PIPE, check=True
            )
            found[f"flush_every {size}"] = json.loads(ran.stdout)
        tell(found)
