"""Two datasets through a worker with the demo model, and what the estimate of the first was worth.

Parquet with the pictures' bytes, and shards that img2dataset made from a web server's pictures:
``make peers`` installs it, and what reads the answers again, apart from blipq.
"""

import io
import json
import subprocess
import sys
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.datasets.shards import audited, check_installed, make_shards
from blipq_worker.bench.stack import Stack, running
from blipq_worker.demo.world import TEST_SEEDS, render, scene

PER_SHARD, SAMPLE, CHECKED = 500, 200, 100
#: Sides of the pictures, in turns.
SIDES = (224, 480, 640, 1024)
TIMEOUT_S = 1800


def demo(rows: int) -> dict[str, Any]:
    """Runs both; what was expected, what it took, and what the answers hold."""
    check_installed()
    with running() as stack:
        stack.start_workers({"BLIPQ_MODELS": "default=demo"})
        tables = _tables(stack, rows)
        tars = _tars(stack, rows)
    wrong = tars.pop("wrong")
    return {"rows": rows, "parquet": tables, "tars": tars, "wrong": wrong}


def _tables(stack: Stack, rows: int) -> dict[str, Any]:
    source, output = stack.folder / "set", stack.folder / "answers"
    source.mkdir()
    for start in range(0, rows, PER_SHARD):
        numbers = range(start, min(start + PER_SHARD, rows))
        table = [{"key": f"row-{n}", "picture": picture(n), "n": n} for n in numbers]
        pq.write_table(pa.Table.from_pylist(table), source / f"{start // PER_SHARD:05}.parquet")
    columns = ("--image-column", "picture", "--id-column", "key")
    _blipq(stack, "bulk", "estimate", source, *columns, "--sample", SAMPLE)
    _blipq(stack, "bulk", "submit", source, *columns, "--output", output)
    stats = json.loads((output / "_stats.json").read_text())
    answers = pq.read_table(output).to_pylist()
    return {
        "expected": {name: stats["estimate"][name] for name in ("jobs", "gpu_s", "run_s")},
        "took": stats["took"],
        "found": audited("tables", f"{output}/*.parquet")["found"],
        "unlike single jobs": _unlike(stack, {each["n"]: each["blipq_text"] for each in answers}),
    }


def _tars(stack: Stack, rows: int) -> dict[str, Any]:
    output = stack.folder / "captioned"
    numbers = [{"n": number} for number in range(rows, 2 * rows)]
    shards = make_shards(stack.folder, numbers, picture, PER_SHARD)
    _blipq(stack, "bulk", "submit", shards, "--to", "webdataset", "--output", output)
    stats = json.loads((output / "_stats.json").read_text())
    return {"took": stats["took"], **audited("tars", f"{output}/*.tar")}


def picture(number: int) -> bytes:
    """A JPEG of a scene that no model was trained on."""
    side, stream = SIDES[number % len(SIDES)], io.BytesIO()
    drawn = render(scene(TEST_SEEDS[40_000 + number])).resize((side, side))
    drawn.save(stream, "JPEG", quality=95)
    return stream.getvalue()


def _unlike(stack: Stack, texts: dict[int, str]) -> int:
    """How many of some rows a job of its own answers otherwise."""
    numbers = sorted(texts)[:: max(1, len(texts) // CHECKED)]
    jobs = [stack.client.caption(picture(number)) for number in numbers]
    stack.client.wait_all(jobs, timeout=TIMEOUT_S)
    asked = zip(jobs, numbers, strict=True)
    return sum(job.result(timeout=0).captions[0].text != texts[number] for job, number in asked)


def _blipq(stack: Stack, *arguments: Any) -> None:
    subprocess.run(
        [sys.executable, "-m", "blipq", *map(str, arguments), "--json"],
        env={**stack.local.environment()},
        cwd=stack.folder,
        check=True,
        stdout=subprocess.DEVNULL,
        timeout=TIMEOUT_S,
    )
