"""Runs the peers on the same jobs, one after the other, beside blipq's own stack."""

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.processes import end
from blipq.contract import ImageRef
from blipq.local.stack import free_port
from blipq_worker.bench.stack import BenchError, Stack
from blipq_worker.bench.workloads import PROMPT, QUESTIONS, Workload
from blipq_worker.catalog.prompts import vqa_prompt

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
TIMEOUT_S = 1_800

#: By workload: the images to warm up with, and those measured.
Rows = Mapping[Workload, tuple[Sequence[ImageRef], Sequence[ImageRef]]]


def run_peer(
    name: str, stack: Stack, rows: Rows, *, model: str, dtype: str, batches: Sequence[int]
) -> dict[str, Any]:
    """Images per second of a peer by the workload's name, at the best of these batch sizes."""
    settings = stack.local.settings()
    secret = settings.s3_secret_access_key
    job = {
        "model": model,
        "dtype": dtype,
        "threads": os.environ.get("OMP_NUM_THREADS", str(os.cpu_count())),
        "redis": settings.redis_url.removesuffix("/0") + "/2",
        "ports": [free_port() for _ in batches],
        "batches": batches,
        "s3": {
            "endpoint": settings.s3_endpoint_url,
            "key": settings.s3_access_key_id,
            "secret": secret.get_secret_value() if secret else "",
            "bucket": settings.inbox_bucket,
        },
        "rows": {
            workload.name: {"warm": _work(workload, warm), "work": _work(workload, work)}
            for workload, (warm, work) in rows.items()
        },
    }
    printed = _printed(name, json.dumps(job))
    # Some of them print more than their figures.
    told = [line for line in printed.splitlines() if line.startswith("{")]
    found: dict[str, Any] = json.loads(told[-1])
    return found


def _printed(name: str, job: str) -> str:
    """What a peer prints. Its servers end with it, however it ends."""
    peer = subprocess.Popen(
        [str(PYTHON), f"{name}.py"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=HERE,
        env={**os.environ, "PYTHONWARNINGS": "ignore", "RAY_DEDUP_LOGS": "0"},
    )
    with peer:
        try:
            printed, errors = peer.communicate(job, timeout=TIMEOUT_S)
        except BaseException:
            end(peer, patience_s=5)
            raise
    if peer.returncode:
        raise BenchError(f"{name} ended with {peer.returncode}:\n{errors[-2000:]}")
    return printed


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
