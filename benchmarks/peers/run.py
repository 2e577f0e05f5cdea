"""Runs the peers on the same jobs, one after the other, beside blipq's own stack."""

import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from blipq.contract import ImageRef
from blipq.local import free_port
from blipq_worker.bench.stack import BenchError, Stack
from blipq_worker.bench.workloads import PROMPT, QUESTIONS, Workload
from blipq_worker.blip2 import vqa_prompt

HERE = Path(__file__).parent
PYTHON = HERE / ".venv" / "bin" / "python"
PEERS = {
    "usual_script": "one generate per image or question",
    "batches_loop": "a loop over batches, no queue",
    "celery_plain": "plain Celery, a task each",
    "celery_batched": "celery-batches",
    "litserve_server": "LitServe",
    "ray_serve": "Ray Serve",
}
TIMEOUT_S = 600


def run_peer(
    name: str,
    stack: Stack,
    workload: Workload,
    images: tuple[Sequence[ImageRef], Sequence[ImageRef]],
    *,
    model: str,
    dtype: str,
) -> dict[str, Any]:
    """Images per second of a peer. ``images``: those to warm up with, and those measured."""
    settings = stack.local.settings()
    secret = settings.s3_secret_access_key
    warm, work = images
    job = {
        "model": model,
        "dtype": dtype,
        "threads": os.environ.get("OMP_NUM_THREADS", str(os.cpu_count())),
        "redis": settings.redis_url.removesuffix("/0") + "/2",
        "ports": [free_port(), free_port()],
        "s3": {
            "endpoint": settings.s3_endpoint_url,
            "key": settings.s3_access_key_id,
            "secret": secret.get_secret_value() if secret else "",
            "bucket": settings.inbox_bucket,
        },
        "warm": _work(workload, warm),
        "work": _work(workload, work),
    }
    ran = subprocess.run(
        [str(PYTHON), f"{name}.py"],
        input=json.dumps(job),
        capture_output=True,
        text=True,
        cwd=HERE,
        env={**os.environ, "PYTHONWARNINGS": "ignore", "RAY_DEDUP_LOGS": "0"},
        timeout=TIMEOUT_S,
    )
    if ran.returncode:
        raise BenchError(f"{name} ended with {ran.returncode}:\n{ran.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return found


def _work(workload: Workload, images: Sequence[ImageRef]) -> list[dict[str, Any]]:
    prompts = [vqa_prompt(each) for each in QUESTIONS[: workload.questions]] or [PROMPT]
    return [
        {
            "key": image.key,
            "prompts": prompts,
            "tokens": generation.max_new_tokens if generation else 0,
        }
        for image, generation in zip(images, workload.generations(len(images)), strict=True)
    ]
