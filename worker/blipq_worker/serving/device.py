"""The device that models run on: chosen, checked, and near."""

import logging
import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from blipq_worker.catalog.models import ModelError
from blipq_worker.process.fleet import on_gpu

log = logging.getLogger(__name__)

_PCI = Path("/sys/bus/pci/devices")
_ON_THE_CPU = "BLIPQ_DEVICE=cpu computes on the CPU"


def usable_device(device: str) -> str:
    """``auto``, ``cpu``, ``cuda`` or ``cuda:N`` as a device that works here, logged in one line.

    Auto is the CPU where there is no GPU, never where there is one that cannot be used. Raises
    ModelError.
    """
    import torch

    if device == "cpu":
        return device
    # Before CUDA counts its devices: by default the fastest comes first. Numbers of whoever has set
    # CUDA_VISIBLE_DEVICES keep their meaning.
    if "CUDA_VISIBLE_DEVICES" not in os.environ:
        os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    if torch.cuda.is_available():
        found = "cuda" if device == "auto" else device
        _require(found)
        return found
    if device == "auto" and not on_gpu(device):
        return "cpu"
    if device == "auto" and torch.version.cuda is None:
        log.warning("there is a GPU here, and torch %s is built without CUDA", torch.__version__)
        return "cpu"
    what = "there is a GPU here, and" if device == "auto" else f"BLIPQ_DEVICE={device}:"
    raise ModelError(f"{what} torch cannot use it: {_why_not()}; {_ON_THE_CPU}")


def _why_not() -> str:
    """Why CUDA does not start, such as a driver that is too old for this build of torch."""
    import torch

    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except (RuntimeError, AssertionError) as error:
        reason = " ".join(str(error).split()).split(" Please ")[0].rstrip(".")
    else:
        reason = "it finds none"
    return f"{reason} (torch {torch.__version__}, CUDA {torch.version.cuda or 'none'})"


def _require(device: str) -> None:
    """Says which GPU it is. Raises ModelError if this torch has no kernels for it."""
    import torch

    index = torch.device(device).index or 0
    if index >= (count := torch.cuda.device_count()):
        raise ModelError(f"BLIPQ_DEVICE={device}: there are {count} GPUs, counted from 0")
    properties = torch.cuda.get_device_properties(index)
    capability = properties.major, properties.minor
    built = torch.cuda.get_arch_list()
    name = f"{properties.name}, compute capability {capability[0]}.{capability[1]}"
    if built and not any(_runs(each, capability) for each in built):
        raise ModelError(
            f"{device} is {name}, and torch {torch.__version__} is built for {', '.join(built)}: "
            f"install a build for it; {_ON_THE_CPU}"
        )
    versions: Any = torch._C  # its stub does not have all
    driver = versions._cuda_getDriverVersion()
    driver = f"{driver // 1000}.{driver % 1000 // 10}"
    log.info("device: %s, %s, CUDA %s, driver's CUDA %s", device, name, torch.version.cuda, driver)


def _runs(arch: str, capability: tuple[int, int]) -> bool:
    """Whether kernels built for ``sm_86`` or ``compute_90`` run on a GPU.

    Binaries run on the same major version, and the compiler's output on all that are newer; with a
    letter at the end, on that GPU alone.
    """
    parts = re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", arch)
    if parts is None:
        return True  # unknown: CUDA itself will report it
    built = int(parts[2]), int(parts[3])
    if parts[4]:
        return built == capability
    same = parts[1] == "compute" or built[0] == capability[0]
    return same and built <= capability


def stay_near(device: str) -> None:
    """Keeps the calling thread on the cores next to a GPU, as far as it may use them.

    Threads that it starts later stay there, too; others may decode anywhere.
    """
    if not device.startswith("cuda") or not hasattr(os, "sched_setaffinity"):
        return
    near = _cores(_near(device)) & os.sched_getaffinity(0)
    if near and near != os.sched_getaffinity(0):
        os.sched_setaffinity(0, near)
        log.info(
            "device: %s is next to %d of the cores: its thread stays on these", device, len(near)
        )


def _near(device: str) -> str:
    """The cores next to a GPU, as the kernel writes them; empty where it does not."""
    import torch

    with suppress(OSError, AttributeError):  # older versions of torch do not know the address
        at: Any = torch.cuda.get_device_properties(torch.device(device))
        address = f"{at.pci_domain_id:04x}:{at.pci_bus_id:02x}:{at.pci_device_id:02x}.0"
        return (_PCI / address / "local_cpulist").read_text().strip()
    return ""


def _cores(listed: str) -> set[int]:
    """``0-3,8`` as numbers."""
    cores: set[int] = set()
    for part in filter(None, listed.split(",")):
        first, _, last = part.partition("-")
        cores.update(range(int(first), int(last or first) + 1))
    return cores
