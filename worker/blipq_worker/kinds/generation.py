"""What the kinds that write texts share."""

from collections.abc import Callable, Iterable
from typing import Any, Literal

from blipq.contract import Generation, TokenLogprob
from blipq_worker.catalog.params import resolve
from blipq_worker.inference.requests import GeneratedText, GenerationParams, ModelInfo

LOOP_NOTE = (
    "a text repeated itself and was ended there (generation.on_loop 'rewrite' has such a text "
    "written once more)"
)
REWRITTEN_NOTE = (
    "a text repeated itself, and was written once more without repeating any three tokens"
)
EMPTY_NOTE = (
    "a text is empty: the model ended it at once (generation.min_new_tokens makes it say something)"
)


def params_of(
    kind: Literal["caption", "vqa"], info: ModelInfo, generation: Generation | None, **forced: Any
) -> GenerationParams:
    """A request's parameters, completed by the defaults of its kind."""
    given = generation.model_dump(exclude_none=True) if generation else {}
    return resolve(kind, info, {"on_loop": "end", **given, **forced})


def confidence(text: GeneratedText, least: float | None) -> dict[str, Any]:
    """How sure the model was of a text, as fields of a ``contract.Written``.

    least: the request's ``min_confidence``.
    """
    mean = text.mean_token_probability
    return {
        "log_likelihood": _rounded(text.log_likelihood),
        "mean_token_probability": _rounded(mean),
        "tokens": text.tokens,
        "finish_reason": text.finish_reason,
        "logprobs": None if text.logprobs is None else _listed(text.logprobs),
        "uncertain": is_uncertain(mean, least),
    }


def is_uncertain(probability: float | None, least: float | None) -> bool | None:
    """True below the request's ``min_confidence``, and where nothing is known; else None."""
    if least is None:
        return None
    return True if probability is None or probability < least else None


def remark(texts: Iterable[GeneratedText], note: Callable[[str], None]) -> None:
    """Notes for the receipt what a person should know about these texts."""
    for text in texts:
        if text.rewritten:
            note(REWRITTEN_NOTE)
        if text.finish_reason == "loop":
            note(LOOP_NOTE)
        if not text.text.strip():
            note(EMPTY_NOTE)


def _listed(logprobs: Iterable[tuple[int, str, float]]) -> tuple[TokenLogprob, ...]:
    return tuple(
        TokenLogprob(id=token, token=text, logprob=round(log, 6)) for token, text, log in logprobs
    )


def _rounded(number: float | None) -> float | None:
    return None if number is None else round(number, 6)
