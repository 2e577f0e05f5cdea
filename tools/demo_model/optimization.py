"""What all training phases share: the schedule, the step and its log."""

import itertools
import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

LOG = logging.getLogger(__name__)
WARM_UP_STEPS = 100


def mixed_precision() -> AbstractContextManager[object]:
    """Matrix products in bfloat16, which is several times faster on the CPUs that have it."""
    return torch.autocast("cpu", torch.bfloat16)


def parameter_groups(*modules: nn.Module, decay: float = 0.02) -> list[dict[str, object]]:
    """Weight decay for the matrices only."""
    parameters = [p for m in modules for p in m.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]


def optimize(
    groups: list[dict[str, object]],
    loss_of: Callable[[int], dict[str, Tensor]],
    steps: int,
    peak: float,
    checkpoint: Callable[[int], None] = lambda step: None,
    every: int = 500,
) -> None:
    """AdamW on the sum of the losses of every step; warm-up, then a half cosine to nothing."""
    optimizer = torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))
    parameters = [p for group in groups for p in group["params"]]  # type: ignore[attr-defined]
    started = time.monotonic()
    for step in range(1, steps + 1):
        losses = loss_of(step)
        total = torch.stack(list(losses.values())).sum()
        optimizer.zero_grad(set_to_none=True)
        total.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            shown = " ".join(f"{name} {value.item():.4f}" for name, value in losses.items())
            LOG.info("step %d/%d %.0f s  %s", step, steps, time.monotonic() - started, shown)
        if step % every == 0 or step == steps:
            checkpoint(step)


def _rate(step: int, steps: int) -> float:
    warm = min(1.0, (step + 1) / WARM_UP_STEPS)
    return warm * (0.5 + 0.5 * math.cos(math.pi * step / steps))


def batches(size: int, batch: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Endless batches of indices, every index once in each round."""
    for _ in itertools.count():
        yield from torch.randperm(size, generator=generator)[: size - size % batch].split(batch)
