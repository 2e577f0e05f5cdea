"""What the kinds that write texts share."""

from typing import Any, Literal

from blipq.contract import Generation
from blipq_worker.catalog.params import resolve
from blipq_worker.inference.requests import GenerationParams, ModelInfo


def params_of(
    kind: Literal["caption", "vqa"], info: ModelInfo, generation: Generation | None, **forced: Any
) -> GenerationParams:
    """A request's parameters, completed by the defaults of its kind."""
    given = generation.model_dump(exclude_none=True) if generation else {}
    return resolve(kind, info, {**given, **forced})
