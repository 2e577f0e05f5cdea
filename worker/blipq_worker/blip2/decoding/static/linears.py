"""A model's layers as a step runs them: fused where they can be, and without waiting."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from blipq_worker.blip2.adapters.layers import LowRank, parts_of

Pass = Callable[[torch.Tensor], torch.Tensor]

#: Columns in which 8-bit layers keep 16 bits, at most: those with the largest outliers.
_OUTLIERS = 32


def pass_of(linear: Any) -> Pass:
    """From (n, in) to (n, out)."""
    own, low = parts_of(linear)
    if low is not None:
        return _adapted(pass_of(own), low)
    if is_eight_bits(linear) and linear.state.threshold > 0:
        return EightBits(linear)
    run: Pass = linear.forward
    return run


def _adapted(run: Pass, low: LowRank) -> Pass:
    def adapted(states: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = low.forward(run(states), states)
        return found

    return adapted


def norm_of(norm: Any) -> Pass:
    """T5's and Llama's norm, (n, size) to its like, in one kernel for transformers' eight."""
    if type(norm).__name__ not in ("T5LayerNorm", "LlamaRMSNorm"):  # apex's is one already
        own: Pass = norm.forward
        return own

    def run(states: torch.Tensor) -> torch.Tensor:
        # Under 8 bits the states between layers are fp32 and the weight is not: no kernel has both.
        if states.dtype != norm.weight.dtype:
            normed: torch.Tensor = norm.forward(states)
            return normed
        size, eps = norm.weight.shape, norm.variance_epsilon
        return torch.nn.functional.rms_norm(states, size, norm.weight, eps)

    return run


def activation_of(activation: Any) -> Pass:
    """An activation in one kernel: transformers computes ``gelu_new`` in eight."""
    if type(activation).__name__ == "NewGELUActivation":
        return partial(torch.nn.functional.gelu, approximate="tanh")
    run: Pass = activation.forward
    return run


def is_eight_bits(layer: Any) -> bool:
    """Whether it is bitsandbytes' 8-bit layer."""
    return type(layer).__name__ == "Linear8bitLt"


class EightBits:
    """bitsandbytes' 8-bit product, which keeps columns with outliers in 16 bits (LLM.int8()).

    Its own looks for these columns on the host, where each layer waits for the device. Here their
    number is fixed: the columns with the largest numbers, as far as they reach the threshold. One
    row with few outliers gives the same numbers. Dettmers et al., arXiv 2208.07339.
    """

    def __init__(self, linear: Any) -> None:
        self._linear = linear
        self._threshold: float = linear.state.threshold

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        """From (n, in) to (n, out)."""
        linear, ops = self._linear, torch.ops.bitsandbytes
        if linear.weight.CB is not None:  # nobody has called it yet
            linear.init_8bit_state()
        weights, scales = linear.state.CB, linear.state.SCB
        halves = states.to(torch.float16)
        highest, columns = halves.abs().amax(0).topk(min(_OUTLIERS, states.shape[1]))
        kept = highest >= self._threshold
        apart = states.index_select(1, columns) * kept
        rest = halves.index_copy(1, columns, halves.index_select(1, columns) * ~kept)
        quantized, largest, _ = ops.int8_vectorwise_quant.default(rest, 0.0)
        bias = None if linear.bias is None else linear.bias.to(states.dtype)
        product: torch.Tensor = ops.int8_scaled_mm.default(
            quantized, weights, largest, scales, bias=bias, dtype=states.dtype
        )
        beside = ops.int8_vectorwise_dequant.default(weights.index_select(1, columns), scales)
        return product.addmm(apart, beside.to(states.dtype).t())


def fused(linears: Sequence[Any]) -> Pass:
    """From (n, in) to the outputs of all layers side by side, (n, their sum).

    Plain layers become views of one weight, so that nothing is held twice, and one product;
    quantized and packed ones stay what they are. Adapters beside them are one product, too, if
    they are not packed themselves.
    """
    own, low = zip(*(parts_of(linear) for linear in linears), strict=True)
    if any(each is not None for each in low) and all(each is None or each.is_plain for each in low):
        widths = [linear.out_features for linear in own]
        return _adapted(fused(own), LowRank.joined(low, widths))
    if all(type(linear) is torch.nn.Linear for linear in linears):
        return _Product(linears)
    passes = [pass_of(linear) for linear in linears]
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
