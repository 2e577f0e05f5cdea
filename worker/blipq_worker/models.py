"""Served models: names for a generation checkpoint and the retrieval checkpoint beside it."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from blipq.errors import BlipqError
from blipq_worker.settings import WorkerSettings

if TYPE_CHECKING:
    from blipq_worker.blip2 import Blip2, FeatureCache

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ServedModel:
    """What a served model's name stands for; a checkpoint is a hub id or a folder.

    Without a retrieval checkpoint, match jobs fail with model_unavailable.
    """

    name: str
    generation: str
    retrieval: str | None = None


@dataclass(frozen=True)
class KnownModel:
    """A model that can be served by its short name."""

    generation: str
    retrieval: str | None
    about: str


_BASE, _COCO = "Salesforce/blip2-itm-vit-g", "Salesforce/blip2-itm-vit-g-coco"

#: Every published BLIP-2 checkpoint, with the retrieval checkpoint that shares its image size.
KNOWN_MODELS: dict[str, KnownModel] = {
    "opt-2.7b": KnownModel("Salesforce/blip2-opt-2.7b", _BASE, "captions, short answers"),
    "opt-6.7b": KnownModel("Salesforce/blip2-opt-6.7b", _BASE, "captions, short answers"),
    "opt-2.7b-coco": KnownModel("Salesforce/blip2-opt-2.7b-coco", _COCO, "best COCO captions"),
    "opt-6.7b-coco": KnownModel("Salesforce/blip2-opt-6.7b-coco", _COCO, "COCO captions"),
    "flan-t5-xl": KnownModel("Salesforce/blip2-flan-t5-xl", _BASE, "questions, instructions"),
    "flan-t5-xxl": KnownModel("Salesforce/blip2-flan-t5-xxl", _BASE, "best answers"),
    "flan-t5-xl-coco": KnownModel("Salesforce/blip2-flan-t5-xl-coco", _COCO, "COCO captions"),
}

#: Parameters of the published checkpoints; tests/worker/test_memory.py counts them.
PARAMETERS: dict[str, int] = {
    "Salesforce/blip2-opt-2.7b": 3_744_761_856,
    "Salesforce/blip2-opt-6.7b": 7_752_869_376,
    "Salesforce/blip2-opt-2.7b-coco": 3_745_353_216,
    "Salesforce/blip2-opt-6.7b-coco": 7_753_460_736,
    "Salesforce/blip2-flan-t5-xl": 3_942_446_592,
    "Salesforce/blip2-flan-t5-xxl": 12_229_596_672,
    "Salesforce/blip2-flan-t5-xl-coco": 3_943_037_952,
    _BASE: 1_172_032_258,
    _COCO: 1_172_623_618,
}


def demo_folder() -> Path:
    """The demo model's checkpoints: a small BLIP-2 of a world of coloured shapes."""
    return Path(str(resources.files("blipq_worker.demo"))) / "models"


def served_model(name: str, what: str) -> ServedModel:
    """What ``what`` stands for: ``demo``, a known model, or ``generation[+retrieval]``."""
    if what == "demo":
        folder = demo_folder()
        return ServedModel(name, str(folder / "opt"), str(folder / "itm"))
    known = KNOWN_MODELS.get(what)
    if known is not None:
        return ServedModel(name, known.generation, known.retrieval)
    generation, _, retrieval = what.partition("+")
    return ServedModel(name, generation, retrieval or None)


class ModelError(BlipqError):
    """A served model cannot be loaded; the message says what to do."""


def load_models(options: WorkerSettings) -> "dict[str, Blip2]":
    """Loads every served model, once, and checks that it makes sense. Raises ModelError.

    CUDA is first touched here: the process has no children to share it with.
    """
    from blipq_worker import canary
    from blipq_worker.blip2 import FeatureCache
    from blipq_worker.goldens import GoldenError, read_goldens

    try:
        goldens = read_goldens(options.goldens) if options.canary else {}
    except GoldenError as error:
        raise ModelError(str(error)) from error
    cache = FeatureCache(options.feature_cache_bytes)
    loaded = {}
    for name, what in options.models.items():
        with _explained(name, options):
            model = _load(name, what, options, cache)
            if options.compile:
                canary.warm(model)
            if options.canary:
                canary.check(model, goldens.get(what))
        loaded[name] = model
    return loaded


def _load(name: str, what: str, options: WorkerSettings, cache: "FeatureCache") -> "Blip2":
    from blipq_worker.blip2 import Blip2
    from blipq_worker.memory import shortage

    served = served_model(name, what)
    device, quantization = where_and_how(options)
    if (told := shortage(options, what, device, quantization)) is not None:
        log.warning("%s", told)
    model = Blip2.load(
        served.generation,
        served.retrieval,
        quantization=quantization,
        quantize_vision=options.quantize_vision,
        dtype=options.dtype,
        attention=options.attention,
        compiled=options.compile,
        device=device,
        slots=options.decode_slots,
        max_beams=options.beams,
        cache=cache,
    )
    # Receipts and indexes name a model as it was asked for, not by its folder here.
    local = served.retrieval is not None and Path(served.retrieval).is_dir()
    retrieval = what if local else served.retrieval
    model.info = replace(model.info, checkpoint=what, retrieval_checkpoint=retrieval)
    return model


def where_and_how(options: WorkerSettings) -> 'tuple[str, Literal["none", "int8", "nf4"]]':
    """The device, and the quantization on it, that the settings come to."""
    import torch

    device = options.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.quantization == "auto":
        return device, "nf4" if device.startswith("cuda") else "none"
    return device, options.quantization


@contextmanager
def _explained(name: str, options: WorkerSettings) -> Iterator[None]:
    """Whatever keeps a model from being served becomes a ModelError that says what to do."""
    import torch

    from blipq_worker.blip2 import CheckpointError
    from blipq_worker.blip2.checkpoints import CheckpointMissing
    from blipq_worker.canary import CanaryError
    from blipq_worker.weights import how_to_get, weights_of_served

    try:
        yield
    except CanaryError as error:
        advice = "it is damaged or does not suit these settings (BLIPQ_CANARY=0 serves it)"
        raise ModelError(f"model {name!r} failed its check: {error}; {advice}") from error
    except CheckpointMissing as error:
        missing = [each for each in weights_of_served(options.models) if not each.present]
        raise ModelError(f"model {name!r}: {error.what}; {how_to_get(missing)}") from error
    except (CheckpointError, ValueError) as error:
        raise ModelError(f"model {name!r}: {error}") from error
    except (torch.OutOfMemoryError, MemoryError) as error:
        told = (str(error) or "out of memory").splitlines()[0]
        advice = f"`blipq models memory {options.models[name]}` counts what it takes"
        raise ModelError(f"model {name!r} does not fit: {told}; {advice}") from error
