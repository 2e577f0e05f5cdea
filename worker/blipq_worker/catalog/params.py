"""How texts are chosen: LAVIS's defaults, and what cannot run."""

from collections.abc import Mapping
from typing import Any, Literal, Protocol

from msgspec.structs import replace

from blipq.contract import ErrorCode
from blipq.errors import PermanentError
from blipq_worker.inference.requests import Family, GenerationParams

#: The repetition penalty of InstructBLIP's jobs, where they name none.
INSTRUCTED_PENALTY = 1.5


class HasFamily(Protocol):
    """A ``ModelInfo``, as far as parameters depend on it."""

    @property
    def family(self) -> Family:
        """The language model's family."""

    @property
    def instructed(self) -> bool:
        """Whether it is an InstructBLIP."""


def resolve(
    kind: Literal["caption", "vqa"], info: HasFamily, overrides: Mapping[str, Any] | None = None
) -> GenerationParams:
    """LAVIS's defaults for the kind and language model, with ``overrides`` (None = not given).

    Parameters without effect are set to their defaults, so that equal work has equal parameters.
    Raises PermanentError ``invalid_request`` for combinations that cannot run.
    """
    given = {name: value for name, value in (overrides or {}).items() if value is not None}
    unknown = given.keys() - set(GenerationParams.__struct_fields__)
    if unknown:
        raise invalid(f"unknown generation parameters: {', '.join(sorted(unknown))}")
    for name in ("temperature", "top_p", "repetition_penalty", "length_penalty"):
        if name in given:
            given[name] = float(given[name])  # transformers refuses whole numbers here
    params = replace(_defaults(kind, info), **given)
    _check_combination(params)
    return _without_idle_parameters(params)


def _defaults(kind: Literal["caption", "vqa"], info: HasFamily) -> GenerationParams:
    family = info.family
    # LAVIS's min_length 1 counts T5's start token, so that it forces no new token there.
    params = GenerationParams(min_new_tokens=0 if family == "t5" else 1)
    if info.instructed:
        params = replace(params, max_new_tokens=256, repetition_penalty=INSTRUCTED_PENALTY)
    if kind == "vqa":
        params = replace(params, max_new_tokens=10, length_penalty=-1.0 if family == "t5" else 0.0)
    return params


def _check_combination(params: GenerationParams) -> None:
    if params.max_new_tokens < 1:
        raise invalid("max_new_tokens must be at least 1")
    if params.min_new_tokens > params.max_new_tokens:
        raise invalid("min_new_tokens is greater than max_new_tokens")
    if params.num_return_sequences > params.num_beams and params.num_beams > 1:
        raise invalid(
            f"num_return_sequences ({params.num_return_sequences}) is greater than num_beams "
            f"({params.num_beams}): raise num_beams, or sample with num_beams 1"
        )
    if params.num_return_sequences > 1 and params.num_beams == 1 and not params.do_sample:
        raise invalid("num_return_sequences above 1 needs beams or sampling")


def _without_idle_parameters(params: GenerationParams) -> GenerationParams:
    if not params.do_sample:
        params = replace(params, temperature=1.0, top_p=0.9, top_k=50, seed=None)
    if params.num_beams == 1:
        params = replace(params, length_penalty=1.0)
    return params


def invalid(message: str) -> PermanentError:
    """What is wrong with a request."""
    return PermanentError(ErrorCode.INVALID_REQUEST, message)
