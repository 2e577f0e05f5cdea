"""How transformers' ``generate`` is called for what blipq writes in flight."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from blipq_worker.inference.requests import GenerationParams


def hugging_face(params: GenerationParams) -> dict[str, Any]:
    """Arguments of ``generate``; what only sampling reads is left out otherwise, as it warns."""
    always = {
        "max_new_tokens": params.max_new_tokens,
        "min_new_tokens": params.min_new_tokens,
        "num_beams": params.num_beams,
        "do_sample": params.do_sample,
        "repetition_penalty": params.repetition_penalty,
        "no_repeat_ngram_size": params.no_repeat_ngram_size,
        "num_return_sequences": params.num_return_sequences,
    }
    if params.num_beams > 1:
        always["length_penalty"] = params.length_penalty
    if not params.do_sample:
        return always
    sampling = {"temperature": params.temperature, "top_p": params.top_p, "top_k": params.top_k}
    return {**always, **sampling}


@contextmanager
def quiet_about_penalties() -> Iterator[None]:
    """That penalties do not see the prompt is LAVIS's behaviour and wanted here."""
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore",
            message=r"Passing `(repetition_penalty|no_repeat_ngram_size)` with `inputs_embeds`",
            category=UserWarning,
        )
        yield
