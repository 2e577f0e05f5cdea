"""Which GPUs ``blipq worker --gpus`` means, and what a worker on one has in its environment."""

import os
import re
import subprocess
from collections.abc import Sequence

from blipq.errors import InvalidRequest

_GPU = re.compile(r"GPU (\d+): .*\(UUID: (GPU-[0-9a-fA-F-]+)\)")
_MIG = re.compile(r"\s+MIG .*\(UUID: (MIG-[0-9a-zA-Z/-]+)\)")
_UUID = re.compile(r"(GPU|MIG)-[0-9a-zA-Z/-]+")
#: The GPUs that a job scheduler has left this process, by CUDA's rules.
_VISIBLE = "CUDA_VISIBLE_DEVICES"


def workers_on(gpus: str) -> list[tuple[str, dict[str, str]]]:
    """The GPU of each worker, as people call it, and the environment that gives it that one alone.

    gpus: ``all``, or indexes and UUIDs such as ``0,MIG-...``. Where CUDA_VISIBLE_DEVICES is set,
    all are those that it names, and indexes count among them, as CUDA does. Raises InvalidRequest.
    """
    visible = _visible()
    if gpus != "all":
        found = [(each, each) for each in _named(gpus, visible)]
    elif visible is not None:
        found = [(each, each) for each in visible]
    else:
        found = _listed()
    # Numbers from outside keep their meaning; ours are those of nvidia-smi.
    order = {} if visible is not None else {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    # Not auto: a worker whose GPU is gone must not compute on the CPU.
    return [(name, {_VISIBLE: device, "BLIPQ_DEVICE": "cuda", **order}) for name, device in found]


def _visible() -> list[str] | None:
    """The GPUs that CUDA_VISIBLE_DEVICES names; None where it is not set."""
    given = os.environ.get(_VISIBLE)
    if given is None:
        return None
    parts = [part.strip() for part in given.split(",")]
    # CUDA reads them up to the first that is none, such as -1.
    count = next((at for at, each in enumerate(parts) if not _is_gpu(each)), len(parts))
    if count == 0:
        raise InvalidRequest(f"no GPU here: {_VISIBLE} is {given!r}")
    return parts[:count]


def _is_gpu(name: str) -> bool:
    return name.isdecimal() or _UUID.fullmatch(name) is not None


def _named(gpus: str, visible: Sequence[str] | None) -> list[str]:
    """The GPUs that ``--gpus`` names, as CUDA_VISIBLE_DEVICES takes them."""
    names = [part.strip() for part in gpus.split(",")]
    if not all(map(_is_gpu, names)):
        raise InvalidRequest(f"--gpus takes 'all', or indexes and UUIDs such as 0,1; not {gpus!r}")
    if visible is not None:
        names = [_among(each, visible) for each in names]
    if len(set(names)) < len(names):
        raise InvalidRequest(f"--gpus names a GPU twice: {gpus!r}; --processes gives it more")
    return names


def _among(name: str, visible: Sequence[str]) -> str:
    if name in visible and not name.isdecimal():
        return name
    if name.isdecimal() and int(name) < len(visible):
        return visible[int(name)]
    raise InvalidRequest(f"--gpus: {name} is not among the GPUs of {_VISIBLE}={','.join(visible)}")


def _listed() -> list[tuple[str, str]]:
    """Every GPU that nvidia-smi lists: its index, and its UUID, which stays if another one is lost.

    A GPU that is partitioned stands for its partitions: CUDA gives a process one of these.
    """
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30)
    except FileNotFoundError:
        raise InvalidRequest("no GPU here: nvidia-smi is not on PATH") from None
    except subprocess.TimeoutExpired:
        raise InvalidRequest("nvidia-smi does not answer: a GPU may be lost") from None
    found: list[tuple[str, str]] = []
    for line in listed.stdout.splitlines():
        if (gpu := _GPU.match(line)) is not None:
            found.append((gpu[1], gpu[2]))
        elif found and (part := _MIG.match(line)) is not None:
            if found[-1][1].startswith("GPU-"):  # its own line is above
                found.pop()
            found.append((part[1], part[1]))
    if not found:
        raise InvalidRequest(f"no GPU here: nvidia-smi says {listed.stderr or listed.stdout!r}")
    return found
