"""Linear layers packed once for a CPU's kernels, in the layout in which oneDNN multiplies.

PyTorch gives fp32 layers to MKL, which is slower on an AMD CPU, and has oneDNN reorder bf16 weights
at every call (``python -m benchmarks packing``). The numbers are the same up to the order of
additions.
"""

from typing import Any

import torch

#: Rows of input for which oneDNN chooses the layout; there may be more or fewer.
_ROWS = 32


class PackedLinear(torch.nn.Module):
    """A ``torch.nn.Linear`` for inference: ``weight`` is opaque, and has its type and device."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        self.out_features = linear.out_features
        packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), _ROWS)
        self.weight: torch.Tensor
        self.bias: torch.Tensor | None
        self.register_buffer("weight", packed)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach())

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """(..., in_features) to (..., out_features)."""
        out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(
            states, self.weight, self.bias, "none", [], ""
        )
        return out


def has_kernels(dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies matrices of this type on this CPU.

    bf16 needs AVX-512 (or its like on other CPUs), and ``ONEDNN_MAX_CPU_ISA`` can take it away.
    """
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float32


def pack(model: torch.nn.Module) -> None:
    """Packs the model's linear layers in place, where they are on a CPU and not quantized.

    Layers whose weights serve elsewhere, too, are left: they would be held twice. So are those of a
    type for which this CPU has no kernels: PyTorch computes with them all the same.
    """
    shared = _shared(model)
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child) is torch.nn.Linear and _fits(child.weight, shared):
                setattr(parent, name, PackedLinear(child))


def _shared(model: torch.nn.Module) -> set[int]:
    """Ids of the parameters that more than one module has."""
    seen: set[int] = set()
    shared: set[int] = set()
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            (shared if id(parameter) in seen else seen).add(id(parameter))
    return shared


def _fits(weight: Any, shared: set[int]) -> bool:
    return weight.device.type == "cpu" and has_kernels(weight.dtype) and id(weight) not in shared
