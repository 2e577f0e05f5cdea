"""Shards that img2dataset makes of pictures on a web server, and what others find in answers.

``make peers`` installs img2dataset, duckdb and webdataset, apart from blipq.
"""

import json
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

HERE = Path(__file__).parent
PEERS = HERE.parent / "peers" / ".venv-datasets" / "bin"
TIMEOUT_S = 1800


def check_installed() -> None:
    """Raises SystemExit where img2dataset is not."""
    if not (PEERS / "img2dataset").exists():
        raise SystemExit("img2dataset is not installed: make peers")


def make_shards(
    folder: Path,
    rows: Sequence[Mapping[str, Any]],
    picture: Callable[[int], bytes],
    per_shard: int,
) -> Path:
    """The folder of WebDataset tars with a sample for each row: its picture and its columns.

    rows: with equal columns, among them ``n``, the number that ``picture`` is given. Beside each
    tar lies a Parquet file of its columns. Raises SystemExit if img2dataset leaves out a row.
    """
    listed, shards = folder / "list.parquet", folder / "shards"
    with _served(picture) as url:
        table = [{**row, "url": f"{url}/{row['n']}.jpg"} for row in rows]
        pq.write_table(pa.Table.from_pylist(table), listed)
        subprocess.run(
            [
                *(str(PEERS / "img2dataset"), f"--url_list={listed}", "--input_format=parquet"),
                f"--save_additional_columns={json.dumps(list(rows[0]))}",
                *(f"--output_folder={shards}", "--output_format=webdataset"),
                *("--resize_mode=no", f"--number_sample_per_shard={per_shard}"),
                *("--processes_count=1", "--thread_count=8", "--disable_all_reencoding=True"),
            ],
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=TIMEOUT_S,
        )
    stats = [json.loads(path.read_text()) for path in shards.glob("*_stats.json")]
    if (made := sum(each["successes"] for each in stats)) != len(rows):
        raise SystemExit(f"img2dataset made {made:,} samples of {len(rows):,} rows")
    return shards


def audited(kind: str, *places: str) -> dict[str, dict[str, int]]:
    """What is found in answers, and what is wrong with them: see ``audit``."""
    ran = subprocess.run(
        [str(PEERS / "python"), "-I", str(HERE / "audit.py"), kind, *places],
        check=True,
        stdout=subprocess.PIPE,
        timeout=TIMEOUT_S,
    )
    found: dict[str, dict[str, int]] = json.loads(ran.stdout)
    return found


class _Server(ThreadingHTTPServer):
    request_queue_size = 128


@contextmanager
def _served(picture: Callable[[int], bytes]) -> Iterator[str]:
    """The URL of a web server whose ``/N.jpg`` is ``picture(N)``, whatever bytes these are."""

    class Pictures(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = picture(int(Path(self.path).stem))
            self.send_response(200)
            self.send_header("Content-Type", "image/jpeg")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            """Says nothing of requests."""

    with _Server(("127.0.0.1", 0), Pictures) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()
