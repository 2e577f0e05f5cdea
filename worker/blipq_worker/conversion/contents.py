"""What a LAVIS checkpoint holds, as a process of its own read it."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blipq.errors import BlipqError
from blipq_worker.catalog.models import one_line
from blipq_worker.catalog.weights import is_lfs_pointer
from blipq_worker.conversion.unpickling import ABOUT, WEIGHTS

#: How long a file may take to read: this, and its size at the speed of a slow disk.
_SECONDS, _BYTES_PER_SECOND = 120.0, 10e6


class ConversionError(BlipqError):
    """A checkpoint cannot be converted; the message is one line with the reason and the remedy."""

    def __init__(self, text: str) -> None:
        super().__init__(one_line(text))


@dataclass(frozen=True, slots=True)
class Contents:
    """A LAVIS checkpoint.

    weights: its weights in safetensors, under LAVIS's names. model: texts and numbers of its
    configuration of the model. beside: what else lies in it, such as the optimizer.
    """

    weights: Path
    model: dict[str, Any]
    epoch: int | None
    beside: tuple[str, ...]


def read(file: Path, folder: Path) -> Contents:
    """Reads a checkpoint; its weights are written to ``folder``. Raises ConversionError."""
    if not file.is_file():
        raise ConversionError(f"{file} is no file")
    if is_lfs_pointer(file):
        raise ConversionError(f"{file} is in Git LFS and not here: run `git lfs pull`")
    # Without the current folder (-P): what lies beside a hostile file may be hostile modules.
    begun = [sys.executable, "-P", "-m", "blipq_worker.conversion.unpickling"]
    limit = _SECONDS + file.stat().st_size / _BYTES_PER_SECOND
    try:
        ended = subprocess.run(
            [*begun, str(file), str(folder)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            timeout=limit,
        )
    except subprocess.TimeoutExpired:
        raise ConversionError(f"{file} was not read within {limit:.0f} s") from None
    if ended.returncode != 0:
        last = ended.stderr.decode(errors="replace").strip().rpartition("\n")[2][:300]
        raise ConversionError(f"{file} ended the process that read it ({ended.returncode}): {last}")
    about = json.loads((folder / ABOUT).read_text())
    if "error" in about:
        why = f"{about['error']}; torch.save writes checkpoints of LAVIS"
        raise ConversionError(f"{file} cannot be read: {why}")
    return Contents(folder / WEIGHTS, about["model"], about["epoch"], tuple(about["beside"]))
