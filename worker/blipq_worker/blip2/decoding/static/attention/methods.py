"""Attention of one new token per slot to what its sequence has in the slot.

Two ways to the same numbers: torch's own, which masks what lies behind each sequence and so reads a
window of all slots, and a Triton kernel, which reads each sequence at its own length.
"""

from typing import Any, NamedTuple, Protocol

import torch

from blipq_worker.blip2.loading.attention import bias_of


class Attention(Protocol):
    """How the new tokens attend.

    windows: whether ``window`` matters; a graph serves one window.
    """

    name: str
    windows: bool

    def prepare(
        self,
        positions: torch.Tensor,
        window: int,
        dtype: torch.dtype,
        bias: torch.Tensor | None,
        ancestry: torch.Tensor | None = None,
    ) -> Any:
        """What all layers of a step share.

        positions: the columns of the new tokens, (n,). window: more than the highest of them.
        bias: what distances add to scores, (heads, distances); None: nothing. ancestry: in which
        slot each column before the new token is read, (n, columns), int32; None: in its own.
        """

    def __call__(
        self, new: torch.Tensor, cache: torch.Tensor, prepared: Any, scale: float
    ) -> torch.Tensor:
        """Stores the keys and values of the new tokens and attends, (n, heads, head size).

        new: queries, keys and values, (n, 3, heads, head size). cache: keys and values of a layer,
        (2, slots, heads, columns, head size). scale: of the queries.
        """

    def prepare_cross(self, lengths: torch.Tensor, columns: int, dtype: torch.dtype) -> Any:
        """What cross attention shares in all layers; lengths: of the prompts, (n,)."""

    def cross(self, queries: torch.Tensor, cache: torch.Tensor, prepared: Any) -> torch.Tensor:
        """Attends to the prompts, unscaled. queries, (n, heads, size); returns their like."""


class _Masked(NamedTuple):
    """slots, positions: of the new tokens, (n,). added: to scores, (n, 1 or heads, 1, window).

    columns: (window,). rows: in which slot each is read, (n, window); None: in its own.
    """

    slots: torch.Tensor
    positions: torch.Tensor
    added: torch.Tensor
    columns: torch.Tensor
    rows: torch.Tensor | None


class MaskedAttention:
    """By torch's fused kernels, with a mask over a window of the columns."""

    name = "sdpa"
    windows = True

    def prepare(
        self,
        positions: torch.Tensor,
        window: int,
        dtype: torch.dtype,
        bias: torch.Tensor | None,
        ancestry: torch.Tensor | None = None,
    ) -> _Masked:
        slots = torch.arange(len(positions), device=positions.device)
        columns = torch.arange(window, device=positions.device)
        added = bias_of(columns <= positions[:, None], dtype)
        if bias is not None:
            distances = (positions[:, None] - columns).clamp(min=0)
            added = added + bias[:, distances].transpose(0, 1)[:, :, None].to(dtype)
        if ancestry is None:
            return _Masked(slots, positions, added, columns, None)
        # What is hidden must be finite: there each reads its own slot, which was cleared.
        before = columns < positions[:, None]
        rows = torch.where(before, ancestry[:, :window], slots[:, None])
        return _Masked(slots, positions, added, columns, rows)

    def __call__(
        self, new: torch.Tensor, cache: torch.Tensor, prepared: _Masked, scale: float
    ) -> torch.Tensor:
        slots, positions, added, columns, rows = prepared
        queries, keys, values = new.unbind(1)
        cache[0][slots, :, positions] = keys
        cache[1][slots, :, positions] = values
        count, window = len(queries), added.shape[-1]
        if rows is None:
            seen = cache[:, :count, :, :window]
        else:
            seen = cache.transpose(2, 3)[:, rows, columns].transpose(2, 3)
        attended = torch.nn.functional.scaled_dot_product_attention(
            (queries if scale == 1.0 else queries * scale)[:, :, None],
            seen[0],
            seen[1],
            attn_mask=added,
            scale=1.0,
        )
        return attended[:, :, 0]

    def prepare_cross(
        self, lengths: torch.Tensor, columns: int, dtype: torch.dtype
    ) -> torch.Tensor:
        """What is added to scores, (n, 1, 1, columns)."""
        return bias_of(torch.arange(columns, device=lengths.device) < lengths[:, None], dtype)

    def cross(
        self, queries: torch.Tensor, cache: torch.Tensor, prepared: torch.Tensor
    ) -> torch.Tensor:
        keys, values = cache[:, : len(queries)]
        attended = torch.nn.functional.scaled_dot_product_attention(
            queries[:, :, None], keys, values, attn_mask=prepared, scale=1.0
        )
        return attended[:, :, 0]


class KernelAttention:
    """By the Triton kernel. Importing it needs triton, compiling it a C compiler."""

    name = "triton"
    windows = False

    def __init__(self) -> None:
        from blipq_worker.blip2.decoding.static.attention import kernel

        self._kernel = kernel

    def prepare(
        self,
        positions: torch.Tensor,
        window: int,
        dtype: torch.dtype,
        bias: torch.Tensor | None,
        ancestry: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """The positions, from which each program takes its length, the bias and the ancestry."""
        return positions, bias, ancestry

    def __call__(
        self,
        new: torch.Tensor,
        cache: torch.Tensor,
        prepared: tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None],
        scale: float,
    ) -> torch.Tensor:
        positions, bias, ancestry = prepared
        return self._kernel.attend_own(new, cache, positions, bias, scale, ancestry)

    def prepare_cross(
        self, lengths: torch.Tensor, columns: int, dtype: torch.dtype
    ) -> torch.Tensor:
        return lengths

    def cross(
        self, queries: torch.Tensor, cache: torch.Tensor, prepared: torch.Tensor
    ) -> torch.Tensor:
        return self._kernel.attend_cross(queries, cache, prepared)
