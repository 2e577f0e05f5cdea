"""``python -m benchmarks.coldstart [--rounds N] [--full]``: a model from S3, or downloaded first.

Each load is a process of its own, and the rounds take turns. From S3: weights go onto the device as
they come. Download first: all files by boto3's parallel transfers to a folder, then the load from
there. The peak is that of the process's resident memory, without the page cache, in which a
downloaded copy lies as well.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

from benchmarks.models import full_size, large
from blipq.local.stack import LocalStack
from blipq.s3.storage import Storage
from blipq_worker.catalog.s3.keys import environment_of, model_storage
from blipq_worker.catalog.s3.objects import Objects
from blipq_worker.catalog.s3.places import place_of
from blipq_worker.serving.pushing import push

BUCKET = "blipq-models"
WAYS = ("disk", "download, then disk", "S3")


def load(way: str, folder: str, place: str) -> dict[str, float]:
    """Seconds and peak MiB of one load, in this process."""
    from transformers.utils.logging import disable_progress_bar

    from blipq_worker.blip2 import Blip2
    from blipq_worker.process.malloc import give_large_blocks_back

    disable_progress_bar()
    give_large_blocks_back()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as copy:
        if way != "disk" and way != "S3":
            _download(place, Path(copy))
            folder = copy
        Blip2.load(place if way == "S3" else folder, device=_device())
        seconds = time.monotonic() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"seconds": seconds, "peak_mib": peak}


def _download(place: str, folder: Path) -> None:
    """All files of a checkpoint, as `aws s3 sync` would get them."""
    where, client = place_of(place), model_storage(connections=16).client
    for name in Objects(where).manifest().files:
        client.download_file(where.bucket, where.key(name), str(folder / name))


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _in_a_process(way: str, folder: str, place: str, reach: Mapping[str, str]) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.coldstart", "--only", way, folder, place]
    ran = subprocess.run(command, env={**os.environ, **reach}, stdout=subprocess.PIPE, timeout=1800)
    found: dict[str, Any] = json.loads(ran.stdout)
    return found


def main() -> None:
    """Measures, and prints a table."""
    parser = argparse.ArgumentParser("python -m benchmarks.coldstart", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--full", action="store_true", help="7.5 GB, as blip2-opt-2.7b has")
    parser.add_argument("--only", nargs=3, metavar=("WAY", "FOLDER", "PLACE"))
    options = parser.parse_args()
    if options.only:
        print(json.dumps(load(*options.only)))
        return
    folder = full_size() if options.full else large()
    size = sum(each.stat().st_size for each in Path(folder).glob("*.safetensors"))
    with tempfile.TemporaryDirectory() as services:
        stack = LocalStack(Path(services))
        stack.start()
        try:
            reach = environment_of(stack.settings())
            os.environ.update(reach)
            Storage(stack.settings()).create_bucket(BUCKET)
            place = push(Path(folder), f"s3://{BUCKET}/{uuid4().hex}")
            found = _rounds(folder, place, reach, options.rounds)
        finally:
            stack.stop()
    print(f"{size / 1e9:.2f} GB of weights, {options.rounds} rounds, {os.cpu_count()} cores")
    _print_table(found)


def _rounds(
    folder: str, place: str, reach: Mapping[str, str], rounds: int
) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    for _ in range(rounds):
        for way in WAYS:
            found[way].append(_in_a_process(way, folder, place, reach))
    return found


def _print_table(found: Mapping[str, list[dict[str, Any]]]) -> None:
    seconds, peaks = (
        {way: statistics.median(each[name] for each in runs) for way, runs in found.items()}
        for name in ("seconds", "peak_mib")
    )
    print("| way | seconds | of download, then disk | peak MiB | of disk |\n|---|---|---|---|---|")
    for way, runs in found.items():
        shown = ", ".join(f"{each['seconds']:.1f}" for each in runs)
        ratio = seconds[way] / seconds["download, then disk"]
        peak = peaks[way] / peaks["disk"]
        print(f"| {way} | {shown} | {ratio:.2f} | {peaks[way]:,.0f} | {peak:.2f} |")


if __name__ == "__main__":
    main()
