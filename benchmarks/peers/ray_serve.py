"""Ray Serve: ``@serve.batch`` on one replica, asked by many clients at once."""

import logging
import os
from concurrent.futures import ThreadPoolExecutor

import ray
from common import CLIENTS, Model, job, tell, timed
from ray import serve


def deployment(size: int):
    @serve.deployment(num_replicas=1, max_ongoing_requests=4 * size)
    class Blip2:
        def __init__(self, told: str) -> None:
            os.environ["PEER_JOB"] = told
            self.model = Model()

        @serve.batch(max_batch_size=size, batch_wait_timeout_s=0.05)
        async def answer(self, batch):
            return self.model.answer(batch)

        async def __call__(self, request):
            return await self.answer(request)

    return Blip2.bind(os.environ["PEER_JOB"])


def measured(size: int) -> dict[str, float]:
    handle = serve.run(deployment(size), name=f"peer-{size}", route_prefix=None)
    try:
        with ThreadPoolExecutor(max(CLIENTS, 2 * size)) as clients:
            return timed(
                lambda work: list(
                    clients.map(lambda each: handle.remote(each).result(timeout_s=600), work)
                )
            )
    finally:
        serve.delete(f"peer-{size}")


if __name__ == "__main__":
    about = job()
    here = os.path.dirname(os.path.abspath(__file__))
    ray.init(
        num_cpus=len(os.sched_getaffinity(0)),
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        runtime_env={"env_vars": {"PYTHONPATH": here, "OMP_NUM_THREADS": about["threads"]}},
    )
    try:
        serve.start(http_options={"location": "NoServer"})
        tell({f"max_batch_size {size}": measured(size) for size in about["batches"]})
    finally:
        serve.shutdown()
        ray.shutdown()
