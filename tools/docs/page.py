"""Sections of pages that a command writes."""

import os
import re
from pathlib import Path

import torch


def replace_section(page: Path, name: str, text: str) -> None:
    """Puts the text between the page's marks of that name."""
    begin, end = f"<!-- begin: {name} -->", f"<!-- end: {name} -->"
    old = page.read_text()
    new, count = re.subn(
        f"(?s){re.escape(begin)}.*?{re.escape(end)}", lambda _: f"{begin}\n{text}\n{end}", old
    )
    if count != 1:
        raise ValueError(f"{page} has {count} sections {name!r}")
    page.write_text(new)


def machine() -> str:
    """What something was measured on, and whether others were at work, in a sentence."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    name = next((line.split(":")[1].strip() for line in lines if "model name" in line), "a CPU")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return (
        f"Measured on {os.cpu_count()} vCPU {name}, {gpu}, {torch.get_num_threads()} threads, "
        f"PyTorch {torch.__version__}; load average {os.getloadavg()[0]:.1f}."
    )
