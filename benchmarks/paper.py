"""A fleet of 1,000 GPUs on paper: what the measured costs of a job add up to, and what fills first.

What a job costs Redis and its worker was measured (``overhead``); a GPU's speed is assumed.
"""

from collections.abc import Mapping
from typing import Any

#: A GPU's captions a second: assumed, as none was at hand.
PER_GPU = 20.0
FLEETS = (1, 10, 100, 1_000)
IMAGE_KB = 100.0


def rows(overhead: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Head and lines of the table."""
    head = ["GPUs", "jobs/s", "Redis cores busy", "S3 GET/s", "S3 Gbit/s", "workers' CPU cores"]
    lines = []
    for gpus in FLEETS:
        rate = gpus * PER_GPU
        lines.append(
            [
                f"{gpus:,}",
                f"{rate:,.0f}",
                f"{rate * overhead['blipq']['redis_cpu_ms'] / 1000:.2f}",
                f"{rate:,.0f}",
                f"{rate * IMAGE_KB * 8 / 1e6:.2f}",
                f"{rate * overhead['blipq with S3']['cpu_ms'] / 1000:.1f}",
            ]
        )
    return head, lines
