"""Two datasets through a worker with the demo model, and what the estimate of the first was worth.

Parquet with the pictures' bytes, and shards that img2dataset made from a web server's pictures:
``make peers`` installs it, and what reads the answers again, apart from blipq.
"""

import functools
import io
import json
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from blipq_worker.bench.stack import Stack, running
from blipq_worker.demo.world import TEST_SEEDS, render, scene

PEERS = Path(__file__).parents[1] / "peers" / ".venv-datasets" / "bin"
PER_SHARD, SAMPLE, CHECKED = 500, 200, 100
#: Sides of the pictures, in turns.
SIDES = (224, 480, 640, 1024)
TIMEOUT_S = 1800
#: What duckdb finds in answers: rows, different keys, and rows that succeeded.
_COUNT = """
import duckdb, sys
print(*duckdb.sql(f"select count(*), count(distinct blipq_key), count(*) filter (where "
                  f"blipq_status = 'succeeded') from '{sys.argv[1]}'").fetchall()[0])
"""
#: The same of shards, by webdataset.
_READ = """
import glob, json, sys, webdataset
read = list(webdataset.WebDataset(sorted(glob.glob(sys.argv[1])), shardshuffle=False))
answers = [json.loads(each["json"]) for each in read]
print(len(read), len({each["__key__"] for each in read}),
      sum(each["blipq_status"] == "succeeded" for each in answers))
"""


def demo(rows: int) -> dict[str, Any]:
    """Runs both; what was expected, what it took, and what the answers hold."""
    if not (PEERS / "img2dataset").exists():
        raise SystemExit("img2dataset is not installed: make peers")
    with running() as stack:
        stack.start_workers({"BLIPQ_MODELS": "default=demo"})
        tables = _tables(stack, rows)
        tars = _tars(stack, rows)
    return {"rows": rows, "parquet": tables, "tars": tars}


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
        "found": _found(_COUNT, f"{output}/*.parquet"),
        "unlike single jobs": _unlike(stack, {each["n"]: each["blipq_text"] for each in answers}),
    }


def _tars(stack: Stack, rows: int) -> dict[str, Any]:
    pictures, shards, output = (stack.folder / name for name in ("web", "shards", "captioned"))
    pictures.mkdir()
    numbers = range(rows, 2 * rows)
    for number in numbers:
        (pictures / f"{number}.jpg").write_bytes(picture(number))
    with _served(pictures) as url:
        lines = [f"{url}/{number}.jpg" for number in numbers]
        (stack.folder / "urls.txt").write_text("\n".join(lines))
        subprocess.run(
            [
                *(str(PEERS / "img2dataset"), f"--url_list={stack.folder / 'urls.txt'}"),
                *(f"--output_folder={shards}", "--output_format=webdataset"),
                *("--resize_mode=no", f"--number_sample_per_shard={PER_SHARD}"),
                *("--processes_count=1", "--thread_count=8", "--disable_all_reencoding=True"),
            ],
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=TIMEOUT_S,
        )
    _blipq(stack, "bulk", "submit", shards, "--to", "webdataset", "--output", output)
    stats = json.loads((output / "_stats.json").read_text())
    return {"took": stats["took"], "found": _found(_READ, f"{output}/*.tar")}


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


def _found(program: str, place: str) -> Sequence[int]:
    """Rows, different keys, and rows that succeeded, as another reader finds them."""
    ran = subprocess.run(
        [str(PEERS / "python"), "-c", program, place],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        timeout=TIMEOUT_S,
    )
    return [int(each) for each in ran.stdout.split()]


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        """Says nothing of requests."""


@contextmanager
def _served(folder: Path) -> Iterator[str]:
    """The URL of a web server with the files of a folder."""
    handler = functools.partial(_Quiet, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()
