"""Types of numbers, by what a device is good at."""

from dataclasses import dataclass
from typing import Literal

import torch

from blipq_worker.blip2.loading.packing import has_kernels
from blipq_worker.inference.requests import Family

Dtype = Literal["auto", "float32", "bfloat16", "float16"]


@dataclass(frozen=True, slots=True)
class Precision:
    """Compute types of the vision tower and of the language model; all else is fp32."""

    vision: torch.dtype
    language: torch.dtype

    def __str__(self) -> str:
        names = [str(part).removeprefix("torch.") for part in (self.vision, self.language)]
        return "/".join(dict.fromkeys(names))


def choose_precision(dtype: Dtype, device: torch.device, family: Family) -> Precision:
    """The types for ``dtype``; ``auto`` is LAVIS's mix on a GPU and bf16 on CPUs that have it.

    With float16, T5 itself still gets bf16, or fp32 on GPUs without bf16: its activations overflow
    fp16. Raises ValueError for fp16 on a CPU, which is slower there than fp32 by an order of
    magnitude.
    """
    if device.type == "cpu":
        if dtype == "float16":
            raise ValueError("float16 is not for CPUs: choose bfloat16, float32 or auto")
        if dtype == "auto":
            dtype = "bfloat16" if cpu_has_bfloat16() else "float32"
    vision: torch.dtype = torch.float16 if dtype == "auto" else getattr(torch, dtype)
    language = vision
    if family == "t5" and vision == torch.float16:
        language = torch.bfloat16 if _gpu_has_bfloat16(device) else torch.float32
    return Precision(vision, language)


def _gpu_has_bfloat16(device: torch.device) -> bool:
    """Whether a GPU multiplies in bf16; what is not here is taken for a new one.

    Before compute capability 8.0 CUDA goes by way of fp32, operation by operation.
    """
    if not torch.cuda.is_available():
        return True
    return torch.cuda.get_device_capability(device) >= (8, 0)


def cpu_has_bfloat16() -> bool:
    """Whether bf16 is faster than fp32 on this CPU: it has the instructions, and kernels for them.

    A CPU without them computes in bf16, too, several times slower.
    """
    capabilities = torch.cpu.get_capabilities()
    instructions = bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
    return instructions and has_kernels(torch.bfloat16)
