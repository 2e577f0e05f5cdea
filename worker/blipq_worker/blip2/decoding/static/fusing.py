"""Linear layers with the same input as one product."""

from collections.abc import Callable, Sequence
from typing import Any

import torch


def fused(linears: Sequence[Any]) -> Callable[[torch.Tensor], torch.Tensor]:
    """From (n, in) to the outputs of all layers side by side, (n, their sum).

    Plain layers become views of one weight, so that nothing is held twice, and one product;
    quantized and packed ones stay what they are.
    """
    if all(type(linear) is torch.nn.Linear for linear in linears):
        return _Product(linears)
    passes = [linear.forward for linear in linears]
    return lambda states: torch.cat([run(states) for run in passes], dim=-1)


class _Product:
    def __init__(self, linears: Sequence[torch.nn.Linear]) -> None:
        with torch.inference_mode(False), torch.no_grad():
            self._weight = _joined([linear.weight for linear in linears])
            biases = [linear.bias for linear in linears if linear.bias is not None]
            assert len(biases) in (0, len(linears))
            self._bias = _joined(biases) if biases else None

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(states, self._weight, self._bias)


def _joined(parameters: Sequence[torch.Tensor]) -> torch.Tensor:
    """All in one piece of memory, of which each parameter becomes its part."""
    whole = _present(parameters)
    if whole is None:
        whole = torch.cat([parameter.data for parameter in parameters])
        start = 0
        for parameter in parameters:
            end = start + len(parameter)
            parameter.data = whole[start:end]
            start = end
    return whole


def _present(parameters: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """The piece of memory, if they are in one already."""
    first = parameters[0]
    storage, next_at = first.untyped_storage().data_ptr(), first.data_ptr()
    for parameter in parameters:
        apart = parameter.data_ptr() != next_at or not parameter.is_contiguous()
        if apart or parameter.untyped_storage().data_ptr() != storage:
            return None
        next_at += parameter.nbytes
    shape = sum(len(parameter) for parameter in parameters), *first.shape[1:]
    return first.data.as_strided(shape, first.stride(), first.storage_offset())
