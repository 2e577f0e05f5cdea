"""The Triton kernel of ``KernelAttention``: one program per slot and head.

It reads the length of its sequence from the device, so that one graph serves every length, and
nothing behind a sequence is ever read. Softmax and sums are in fp32.
"""

from typing import Any

import torch
import triton
import triton.language as tl

#: Columns that a program reads at once, and its warps: measured on an H100 at lengths about 50.
_BLOCK = 32
_WARPS = 1


@triton.jit
def _own(new, keys, values, apart, inside, scale):  # type: ignore[no-untyped-def]
    """A slot's new key and value, stored at its end: (scaled query, its score, value), all fp32.

    new: the query's numbers; key and value are ``apart`` and twice as far behind it. keys, values:
    where they go. inside: which of the padded numbers there are.
    """
    query = tl.load(new, mask=inside, other=0.0).to(tl.float32)
    key = tl.load(new + apart, mask=inside, other=0.0)
    value = tl.load(new + 2 * apart, mask=inside, other=0.0)
    # Scaled in fp32 and rounded, as the model rounds it.
    query = (query * scale).to(key.dtype).to(tl.float32)
    tl.store(keys, key, mask=inside)
    tl.store(values, value, mask=inside)
    return query, tl.sum(query * key.to(tl.float32), 0), value.to(tl.float32)


@triton.jit  # type: ignore[untyped-decorator]
def _places(rows, at, seen, slot, apart, shared: tl.constexpr):  # type: ignore[no-untyped-def]
    """Where columns ``at`` of a slot are read, in columns from its first one.

    rows: with ``shared``, in which slot each column is; slots are ``apart`` columns from each
    other. Only what is ``seen`` is looked up.
    """
    places = at
    if shared:
        row = tl.load(rows + at, mask=seen, other=0).to(tl.int64)
        places = (row - slot) * apart + at
    return places


@triton.jit  # type: ignore[untyped-decorator]
def _attend(  # type: ignore[no-untyped-def]
    queries,
    cache,
    lengths,
    bias,
    rows,
    out,
    scale,
    values_at,
    columns,
    distances,
    row_columns,
    heads: tl.constexpr,
    size: tl.constexpr,
    padded: tl.constexpr,
    block: tl.constexpr,
    own: tl.constexpr,
    biased: tl.constexpr,
    shared: tl.constexpr,
):
    """One query over the first ``length`` columns of its slot; with ``own``, over its own key, too.

    queries: (n, 3, heads, size) with ``own``: queries, keys, values; else (n, heads, size).
    cache: (2, slots, heads, columns, size), values ``values_at`` behind the keys. bias: (heads,
    distances). rows: with ``shared``, in which slot each column is read, (n, ``row_columns``).
    """
    slot = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    length = tl.load(lengths + slot)
    dims = tl.arange(0, padded)
    inside = dims < size
    keys = cache + (slot * heads + head) * columns * size
    values = keys + values_at
    if own:
        new = queries + (slot * 3 * heads + head) * size + dims
        end = length * size + dims
        query, top, mixed = _own(new, keys + end, values + end, heads * size, inside, scale)
        if biased:
            top += tl.load(bias + head * distances).to(tl.float32)
        total = tl.exp(top - top)
    else:
        query = tl.load(queries + (slot * heads + head) * size + dims, mask=inside, other=0.0)
        query = query.to(tl.float32)
        top = tl.sum(query * 0.0, 0) - float("inf")
        total = tl.sum(query * 0.0, 0)
        mixed = query * 0.0
    steps = tl.arange(0, block)
    for start in range(0, length, block):
        at = start + steps
        seen = at < length
        both = seen[:, None] & inside[None, :]
        places = _places(rows + slot * row_columns, at, seen, slot, heads * columns, shared)
        offsets = places[:, None] * size + dims[None, :]
        some = tl.load(keys + offsets, mask=both, other=0.0).to(tl.float32)
        scores = tl.sum(some * query[None, :], 1)
        if biased:
            scores += tl.load(bias + head * distances + (length - at), mask=seen, other=0.0).to(
                tl.float32
            )
        scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 0))
        kept = tl.exp(top - higher)
        weights = tl.exp(scores - higher)
        some = tl.load(values + offsets, mask=both, other=0.0).to(tl.float32)
        total = total * kept + tl.sum(weights, 0)
        mixed = mixed * kept + tl.sum(weights[:, None] * some, 0)
        top = higher
    place = out + (slot * heads + head) * size + dims
    tl.store(place, (mixed / total).to(out.dtype.element_ty), mask=inside)


def attend_own(
    new: torch.Tensor,
    cache: torch.Tensor,
    positions: torch.Tensor,
    bias: torch.Tensor | None,
    scale: float,
    ancestry: torch.Tensor | None = None,
) -> torch.Tensor:
    """Self-attention; see ``Attention.__call__``. new and ancestry must be contiguous."""
    out = torch.empty_like(new[:, 0], memory_format=torch.contiguous_format)
    return _run(new, cache, positions, bias, scale, out, ancestry, own=True)


def attend_cross(queries: torch.Tensor, cache: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Cross attention; see ``Attention.cross``. queries must be contiguous."""
    return _run(queries, cache, lengths, None, 1.0, torch.empty_like(queries), None, own=False)


def _run(
    queries: torch.Tensor,
    cache: torch.Tensor,
    lengths: torch.Tensor,
    bias: torch.Tensor | None,
    scale: float,
    out: torch.Tensor,
    rows: torch.Tensor | None,
    *,
    own: bool,
) -> torch.Tensor:
    count, heads, size = out.shape
    launch: Any = _attend[(count, heads)]
    launch(
        queries,
        cache,
        lengths,
        cache if bias is None else bias,
        lengths if rows is None else rows,
        out,
        scale,
        cache.stride(0),
        cache.shape[3],
        0 if bias is None else bias.shape[1],
        0 if rows is None else rows.shape[1],
        heads=heads,
        size=size,
        padded=triton.next_power_of_2(size),
        block=_BLOCK,
        own=own,
        biased=bias is not None,
        shared=rows is not None,
        num_warps=_WARPS,
    )
    return out
