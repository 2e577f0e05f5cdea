"""Rows of token ids as one rectangle."""

from collections.abc import Sequence

import torch


def padded(
    rows: Sequence[Sequence[int]], pad: int, device: torch.device, *, left: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask of shape (rows, longest); ``left``: the gaps come first."""
    width = max(map(len, rows))
    ids, mask = [], []
    for row in rows:
        gap, ones = width - len(row), [1] * len(row)
        before, after = (gap, 0) if left else (0, gap)
        ids.append([pad] * before + list(row) + [pad] * after)
        mask.append([0] * before + ones + [0] * after)
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)
