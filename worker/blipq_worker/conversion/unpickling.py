"""The process that reads a pickled checkpoint: ``python -m blipq_worker.conversion.unpickling``.

Pickles can be programs. Torch's restricted reader runs none of them; that a file may still take all
memory, or for ever, or find a fault in the reader, is why it is read in a process of its own, which
has little memory, can be ended, and leaves plain files: ``WEIGHTS`` and ``ABOUT``.
"""

import json
import re
import resource
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import save_file

WEIGHTS, ABOUT = "weights.safetensors", "about.json"

#: Memory for a file that is read, in multiples of its size, and beside that. Files are mapped;
#: weights that share their memory in a file, as tied ones do, are copied.
_TIMES, _BESIDE = 2, 2**30
#: Room for the names of weights in a file that is written.
_HEADER = 2**24


def main() -> None:
    """Reads the file of the first argument into the folder of the second."""
    file, folder = Path(sys.argv[1]), Path(sys.argv[2])
    _limit(file.stat().st_size)
    try:
        about = _read(file, folder)
    except Exception as error:
        about = {"error": _reason(error)}
    (folder / ABOUT).write_text(json.dumps(about))


def _limit(size: int) -> None:
    """Bounds what this process may allocate and write from here on."""
    taken: int = psutil.Process().memory_info().vms  # torch alone maps gigabytes
    for kind, bound in (
        (resource.RLIMIT_AS, taken + _TIMES * size + _BESIDE),
        (resource.RLIMIT_FSIZE, _TIMES * size + _HEADER),
        (resource.RLIMIT_CORE, 0),
    ):
        hardest = resource.getrlimit(kind)[1]
        bound = bound if hardest == resource.RLIM_INFINITY else min(bound, hardest)
        resource.setrlimit(kind, (bound, bound))


def _read(file: Path, folder: Path) -> dict[str, Any]:
    stored = torch.load(
        str(file), map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file)
    )
    if not isinstance(stored, Mapping):
        raise ValueError("it holds no weights by name")
    weights = stored.get("model", stored)
    tensors = {
        name: each
        for name, each in (weights.items() if isinstance(weights, Mapping) else ())
        if isinstance(name, str) and isinstance(each, torch.Tensor)
    }
    if not tensors:
        raise ValueError("it holds no weights by name")
    save_file(_apart(tensors), folder / WEIGHTS)
    beside = sorted(str(name) for name in stored if name != "model") if "model" in stored else []
    epoch = stored.get("epoch")
    return {
        "model": _plain(stored.get("config")),
        "epoch": epoch if isinstance(epoch, int) else None,
        "beside": beside[:20],
    }


def _apart(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors with memory of their own, in one piece each."""
    seen: set[int] = set()
    apart = {}
    for name, each in tensors.items():
        storage = each.untyped_storage()
        whole = each.is_contiguous() and storage.nbytes() == each.nbytes
        own = whole and storage.data_ptr() not in seen
        apart[name] = each if own else each.clone(memory_format=torch.contiguous_format)
        seen.add(storage.data_ptr())
    return apart


def _plain(config: Any) -> dict[str, str | int | float]:
    """The model's part of LAVIS's configuration, as far as it is texts and numbers."""
    model = config.get("model") if isinstance(config, Mapping) else None
    return {
        name: each
        for name, each in (model.items() if isinstance(model, Mapping) else ())
        if isinstance(name, str) and isinstance(each, str | int | float)
    }


def _reason(error: Exception) -> str:
    # Torch's advice around its reader's own words is to read the file without care.
    text = str(error).partition("WeightsUnpickler error:")[2] or str(error)
    text = text.partition("Check the documentation")[0]
    if named := re.search(r"GLOBAL (\S+)", text):
        return (
            f"it names {named[1]}, which is neither a weight nor a plain value; nothing of it was "
            "run. Where you trust the file, save its weights alone: "
            "torch.save({'model': torch.load(FILE, weights_only=False)['model']}, OTHER)"
        )
    if isinstance(error, MemoryError) or "allocate memory" in text:
        return "it needs more memory than weights of its size do"
    return " ".join(f"{type(error).__name__}: {text}".split())[:300]


if __name__ == "__main__":
    main()
