"""Sections of pages that a command writes."""

import os
from pathlib import Path

import torch
from tools.docs import with_section


def replace_section(page: Path, name: str, text: str) -> None:
    """Puts the text between the page's marks of that name."""
    page.write_text(with_section(page.read_text(), name, text))


def machine() -> str:
    """What something was measured on, and whether others were at work, in a sentence."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    name = next((line.split(":")[1].strip() for line in lines if "model name" in line), "a CPU")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return (
        f"Measured on {os.cpu_count()} vCPU {name}, {gpu}, {torch.get_num_threads()} threads, "
        f"PyTorch {torch.__version__}; load average {os.getloadavg()[0]:.1f}."
    )
