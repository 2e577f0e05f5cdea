"""What all peers share: the model through transformers, pictures from S3, the clock.

The job on stdin: model (folder), dtype, s3 (endpoint and keys), redis, batches (the sizes to try),
and rows: {name: {warm, work}}, both lists of {key, prompts, tokens}. A request of a peer is one
image and one prompt.
"""

import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

CLIENTS = 48


def job() -> dict[str, Any]:
    """The job, which a peer's own processes find in its environment."""
    if "PEER_JOB" not in os.environ:
        os.environ["PEER_JOB"] = sys.stdin.read()
    found: dict[str, Any] = json.loads(os.environ["PEER_JOB"])
    return found


def requests(work: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One per image and prompt."""
    return [
        {"key": each["key"], "prompt": prompt, "tokens": each["tokens"]}
        for each in work
        for prompt in each["prompts"]
    ]


@cache
def storage() -> Any:
    """The S3 client."""
    import boto3
    from botocore.config import Config

    s3 = job()["s3"]
    return boto3.client(
        "s3",
        endpoint_url=s3["endpoint"],
        aws_access_key_id=s3["key"],
        aws_secret_access_key=s3["secret"],
        region_name="us-east-1",
        config=Config(max_pool_connections=64, s3={"addressing_style": "path"}),
    )


def fetch(key: str) -> Any:
    """A picture, decoded."""
    from PIL import Image

    body = storage().get_object(Bucket=job()["s3"]["bucket"], Key=key)["Body"].read()
    return Image.open(io.BytesIO(body)).convert("RGB")


class Model:
    """BLIP-2 as transformers' documentation runs it, in batches with padding on the left."""

    def __init__(self) -> None:
        import torch
        from transformers import AutoProcessor, Blip2ForConditionalGeneration

        about = job()
        self._torch = torch
        self._processor = AutoProcessor.from_pretrained(about["model"])
        self._processor.tokenizer.padding_side = "left"
        dtype = getattr(torch, about["dtype"])
        model = Blip2ForConditionalGeneration.from_pretrained(about["model"], dtype=dtype)
        self._model, self._dtype = model.eval(), dtype
        self._threads = ThreadPoolExecutor(8)

    def answer(self, batch: Sequence[dict[str, Any]]) -> list[str]:
        """A text per request. A batch runs until its longest is done; 0 tokens: 5 beams."""
        pictures = list(self._threads.map(fetch, [each["key"] for each in batch]))
        inputs = self._processor(
            images=pictures,
            text=[each["prompt"] for each in batch],
            padding=True,
            return_tensors="pt",
        ).to(self._dtype)
        most = max(each["tokens"] for each in batch)
        lengths = {"min_new_tokens": most, "max_new_tokens": most, "num_beams": 1}
        beams = {"num_beams": 5, "max_new_tokens": 30}
        with self._torch.inference_mode():
            written = self._model.generate(**inputs, **(lengths if most else beams))
        start = inputs["input_ids"].shape[1]
        texts: list[str] = self._processor.batch_decode(
            [
                row[start:][: each["tokens"] or None]
                for row, each in zip(written, batch, strict=True)
            ],
            skip_special_tokens=True,
        )
        return texts


def timed(run: Callable[[Sequence[dict[str, Any]]], Sequence[Any]]) -> dict[str, float]:
    """Images per second of a way to answer requests, by row, after it has warmed up for the row."""
    return {name: _timed(run, **row) for name, row in job()["rows"].items()}


def _timed(
    run: Callable[[Sequence[dict[str, Any]]], Sequence[Any]],
    warm: Sequence[dict[str, Any]],
    work: Sequence[dict[str, Any]],
) -> float:
    run(requests(warm))
    asked = requests(work)
    started = time.monotonic()
    answers = run(asked)
    took = time.monotonic() - started
    assert len(answers) == len(asked), "an answer is missing"
    assert all(isinstance(answer, str) for answer in answers), "an answer is no text"
    return len(work) / took


def celery_worker(module: str) -> "subprocess.Popen[bytes]":
    """A worker of a module's app."""
    command = [sys.executable, "-m", "celery", "-A", module, "worker", "--pool", "solo"]
    return subprocess.Popen([*command, "--loglevel", "ERROR"], stdout=subprocess.DEVNULL)


def tell(by_setting: dict[str, dict[str, float]]) -> None:
    """Prints, by row, the best setting and all of them."""
    found = {}
    for row in job()["rows"]:
        rates = {setting: by_row[row] for setting, by_row in by_setting.items()}
        best = max(rates, key=lambda each: rates[each])
        found[row] = {"images_per_s": rates[best], "setting": best, "all": rates}
    print(json.dumps(found), flush=True)
