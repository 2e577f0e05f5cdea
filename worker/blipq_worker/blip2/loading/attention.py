"""Which code computes attention, part by part, and our own for CPUs in bf16."""

import importlib.util
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import torch
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from blipq_worker.inference.requests import Family

if TYPE_CHECKING:
    from blipq_worker.blip2.loading.precision import Precision

Attention = Literal["auto", "sdpa", "eager", "flash_attention_2"]

#: From (query, key, value, what to add to scores), as ``matrices`` takes them, to its output.
NextTokenAttention = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor
]

#: ``matrices``, as transformers knows it.
_MATRICES = "blipq_matrices"


def choose_attention(
    attention: Attention, family: Family, precision: "Precision", device: torch.device
) -> dict[str, str]:
    """The implementation for each part, by the name of its configuration ("": the whole).

    auto is sdpa, but ``matrices`` for a vision tower, OPT and Llama in bf16 on a CPU. For these is
    flash_attention_2, too: the Q-Former is fp32, which it cannot do, and T5's distances are biases,
    which neither can add. Both stay with sdpa. Raises ValueError where it cannot run.
    """
    if attention == "auto":
        by_matrices = device.type == "cpu" and precision.vision == torch.bfloat16
        return _for_vision_and_causal(_MATRICES, family) if by_matrices else _everywhere("sdpa")
    if attention != "flash_attention_2":
        return _everywhere(attention)
    if device.type != "cuda" or torch.float32 in (precision.vision, precision.language):
        raise ValueError("flash_attention_2 needs a GPU and 16 bits: choose sdpa or another dtype")
    if importlib.util.find_spec("flash_attn") is None:
        raise ValueError("flash_attention_2 needs `pip install flash-attn`, or choose sdpa")
    return _for_vision_and_causal(attention, family)


def _everywhere(attention: str) -> dict[str, str]:
    return dict.fromkeys(("", "vision_config", "qformer_config", "text_config"), attention)


def _for_vision_and_causal(attention: str, family: Family) -> dict[str, str]:
    language = attention if family in ("opt", "llama") else "sdpa"
    return {**_everywhere("sdpa"), "vision_config": attention, "text_config": language}


def matrices(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float = 1.0,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention as two products of matrices, each a call of the CPU's library.

    query: (B, heads, L, width); key, value: (B, heads, K, width), or fewer heads, each of which
    serves several of the query; attention_mask: added to the scores, (B, 1, L, K). Returns (B, L,
    heads, width). In bf16 this is faster than PyTorch's fused kernel, for images and still more for
    the next token of many rows: there it is a matrix by a vector, and the keys are read where they
    are.
    """
    if scaling != 1.0:
        query = query * scaling
    if (sharing := query.shape[1] // key.shape[1]) > 1:
        key, value = (each.repeat_interleave(sharing, dim=1) for each in (key, value))
    if query.shape[2] == 1:
        scores = (key @ query.transpose(2, 3)).transpose(2, 3)
    else:
        scores = query @ key.transpose(2, 3)
    if attention_mask is not None:
        scores = scores + attention_mask
    return (scores.softmax(-1) @ value).transpose(1, 2).contiguous(), None


def next_token_attention(implementation: str) -> NextTokenAttention:
    """The code for steps of one token per row, where transformers' own is not called.

    flash_attention_2 is made for many tokens and adds nothing to scores: sdpa stands in for it.
    """
    return _by_matrices if implementation in (_MATRICES, "eager") else _fused


def beam_attention(implementation: str) -> NextTokenAttention:
    """The same for steps of a few tokens per slot. Here fused kernels are faster in bf16, too:

    they read the first columns of a slot where they are, which products of matrices copy.
    """
    return _by_matrices if implementation == "eager" else _fused


def _by_matrices(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    return matrices(None, query, key, value, bias)[0]


def _fused(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    attended = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=bias, scale=1.0
    )
    return attended.transpose(1, 2)


def bias_of(seen: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What to add to scores, (rows, 1, queries, columns), so that only what is seen counts.

    seen: (rows, queries, columns), or (rows, columns) for one query each.
    """
    bias = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
    bias = bias.masked_fill(~seen, torch.finfo(dtype).min)
    return bias[:, None] if bias.dim() == 3 else bias[:, None, None]


AttentionInterface.register(_MATRICES, matrices)
AttentionMaskInterface.register(_MATRICES, eager_mask)
