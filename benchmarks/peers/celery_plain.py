"""Plain Celery: a task per image or question, a solo pool, results in Redis."""

from functools import cache

from celery import Celery
from common import Model, celery_worker, job, tell, timed

app = Celery("celery_plain", broker=job()["redis"], backend=job()["redis"])
app.conf.update(worker_prefetch_multiplier=4, task_default_queue="peer-plain")


@cache
def model() -> Model:
    return Model()


@app.task
def answer(request):
    return model().answer([request])[0]


def run(work):
    results = [answer.delay(request) for request in work]
    return [result.get(timeout=600) for result in results]


if __name__ == "__main__":
    worker = celery_worker("celery_plain")
    try:
        import celery_plain

        tell({"solo pool": timed(celery_plain.run)})
    finally:
        worker.terminate()
        worker.wait()
