"""The machine at hand as a worker: weights, disk, GPU and torch."""

import importlib.metadata
import json
import shutil
import subprocess
import sys

from blipq.local.worker import has_worker
from blipq.ops.doctor.findings import Finding, Findings


def check_machine(import_torch: bool) -> Findings:
    if not has_worker():
        yield Finding("ok", "this machine", "a producer: no worker is installed here")
        return
    yield from _weights()
    gpus = _gpus()
    if gpus is None:
        advice = "a GPU needs NVIDIA's driver; the demo model does without"
        yield Finding(
            "warn", "gpu", "nvidia-smi is not here: a worker would run on the CPU", advice
        )
        return
    yield from gpus
    version = importlib.metadata.version("torch")
    if version.endswith("+cpu"):
        advice = "install the CUDA build: `make clean`, then `make demo TORCH=cuda`"
        yield Finding("bad", "torch", f"torch {version} is built without CUDA", advice)
    elif import_torch:
        yield _torch_sees_cuda(version)
    else:
        yield Finding("ok", "torch", f"torch {version}; check CUDA with --torch")


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 0.1e9 else f"{count / 1e6:.1f} MB"


def _weights() -> Findings:
    """The weights of BLIPQ_MODELS, and room for those that are not here yet."""
    command = [sys.executable, "-P", "-m", "blipq", "models", "weights"]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=60)
    if answer.returncode:
        reason = (answer.stderr.strip() or "no answer").splitlines()[-1]
        yield Finding("bad", "weights", reason, "correct BLIPQ_MODELS and the other settings")
        return
    found = json.loads(answer.stdout)
    for each in found["weights"]:
        size = "" if each["bytes"] is None else f", {_size(each['bytes'])}"
        if each["present"]:
            yield Finding("ok", "weights", f"{each['checkpoint']}{size}")
    missing = [each for each in found["weights"] if not each["present"]]
    if missing:
        names = ", ".join(each["checkpoint"] for each in missing)
        needed = sum(each["bytes"] or 0 for each in missing)
        full = needed > found["free"]
        message = f"missing: {names}" + (", and the disk is too full" if full else "")
        bad = full or any(each.get("problem") for each in missing)
        yield Finding("bad" if bad else "warn", "weights", message, found["advice"])
    for each in found.get("adapters", []):
        name = f"{each['name']} over {each['base']}"
        if each["problem"] is None:
            size = _size(each["bytes"])
            message = f"{name}: {each['folder']}, rank {each['rank']}, {size}"
            yield Finding("ok", "adapter", message)
        else:
            advice = "correct BLIPQ_ADAPTERS or the folder: docs/adapters.md"
            yield Finding("bad", "adapter", f"{name}: {each['problem']}", advice)


def _gpus() -> Findings | None:
    if shutil.which("nvidia-smi") is None:
        return None
    query = "name,driver_version,memory.total,memory.free"
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits"]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=30)
    return _gpu_findings(answer)


def _gpu_findings(answer: "subprocess.CompletedProcess[str]") -> Findings:
    lines = [line.split(", ") for line in answer.stdout.splitlines() if line.count(", ") == 3]
    if answer.returncode or not lines:
        reason = (answer.stderr or answer.stdout or "it lists no GPU").strip().splitlines()[0]
        yield Finding("bad", "gpu", f"nvidia-smi: {reason}", "install NVIDIA's driver, or reboot")
    for name, driver, total, free in lines:
        message = f"{name}, driver {driver}, {free} of {total} MiB free"
        yield Finding("ok", "gpu", message)


def _torch_sees_cuda(version: str) -> Finding:
    code = "import torch; print(torch.cuda.is_available(), torch.version.cuda)"
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120
    )
    if answer.stdout.startswith("True"):
        return Finding("ok", "torch", f"torch {version} sees CUDA {answer.stdout.split()[1]}")
    advice = "the driver is older than this build of torch, or CUDA_VISIBLE_DEVICES hides the GPU"
    return Finding("bad", "torch", f"torch {version} sees no CUDA", advice)
