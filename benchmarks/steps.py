"""A decode step through OPT's layers alone, and through transformers' decoder."""

import time
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.models import mid_size
from blipq_worker.blip2 import Blip2
from blipq_worker.blip2.decoding import DecodeLoop, Row
from blipq_worker.blip2.decoding.opt_step import OptStep
from blipq_worker.inference.requests import GenerationParams

ROWS = (1, 8, 32)
STEPS, PROMPT = 40, [2, 5, 6, 7]
PARAMS = GenerationParams(num_beams=1, max_new_tokens=STEPS + 2, min_new_tokens=STEPS + 2)


def steps(repeats: int) -> dict[str, Any]:
    """Milliseconds a step, the fewest of ``repeats`` loops, by rows that run together."""
    model = Blip2.load(mid_size().split("+")[0], dtype="auto").generator.model.language_model
    found = {}
    for rows in ROWS:
        own = min(_step_ms(model, rows) for _ in range(repeats))
        with patch.object(OptStep, "suits", return_value=False):
            whole = min(_step_ms(model, rows) for _ in range(repeats))
        found[str(rows)] = {"own_ms": own, "decoder_ms": whole, "ratio": whole / own}
    return found


def _step_ms(model: Any, number: int) -> float:
    width, dtype = model.config.hidden_size, model.get_input_embeddings().weight.dtype
    rows = [Row(torch.randn(32, width).to(dtype), PROMPT, PARAMS) for _ in range(number)]
    loop = DecodeLoop(model, ends=(), slots=number)
    loop.join(rows)
    loop.step(rows)
    started = time.monotonic()
    for _ in range(STEPS):
        loop.step(rows)
    return 1000 * (time.monotonic() - started) / STEPS
