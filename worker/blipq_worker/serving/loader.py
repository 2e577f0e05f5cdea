"""Loads a worker's models; where that fails, the error has the remedy."""

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING

from msgspec.structs import replace

from blipq_worker.catalog.adapters import Adapter, AdapterError, read_adapter
from blipq_worker.catalog.models import VARIANTS, ModelError, served_model
from blipq_worker.catalog.s3.errors import S3ModelAway, S3ModelError
from blipq_worker.catalog.weights import how_to_get, weights_of_served
from blipq_worker.engine.faults import DeviceLost, is_device_fault
from blipq_worker.process.malloc import give_large_blocks_back
from blipq_worker.serving.device import stay_near, usable_device
from blipq_worker.serving.memory import Kept, instead, kept_on, require_one_device, shortage
from blipq_worker.settings import WorkerSettings
from blipq_worker.startup import START

if TYPE_CHECKING:
    from blipq_worker.blip2 import Blip2, FeatureCache
    from blipq_worker.serving.goldens import Golden

log = logging.getLogger(__name__)

#: What is wrong, in most cases, with a model of one's own that loads and writes nonsense.
FINE_TUNE_CHECKS = (
    "For a model of your own check that an adapter (LoRA) was merged into the weights that were "
    "saved, that its base is the checkpoint it was trained on, that tokenizer and embeddings have "
    "the same size, that it does not overflow in 16 bits (BLIPQ_DTYPE=float32), and that epsilon "
    "and image size in config.json are those of its training (a warning above names others)"
)


def load_models(
    options: WorkerSettings,
    opening: AbstractContextManager[object] = nullcontext(),  # noqa: B008
) -> "dict[str, Blip2]":
    """Loads every served model, once, and checks that it makes sense.

    opening: is entered while graphs are captured, on GPUs alone. Raises ModelError, InvalidRequest
    for the settings of S3, and where another try may succeed DeviceLost and S3ModelAway.

    CUDA is first touched here: the process has no children to share it with. The thread that loads
    ends with it, and so do OpenMP's helpers of that thread. Where these and the ones of the thread
    that runs the models are more than there are cores, all of them sleep between two operations
    instead of spinning: a decode step took twice as long.
    """
    loaded: Future[dict[str, Blip2]] = Future()
    # A daemon: an interrupted worker ends at once.
    args = loaded, options, opening
    Thread(target=_settle, args=args, name="blipq-load", daemon=True).start()
    return loaded.result()


def _settle(
    loaded: "Future[dict[str, Blip2]]",
    options: WorkerSettings,
    opening: AbstractContextManager[object],
) -> None:
    try:
        loaded.set_result(_load_all(options, opening))
    except BaseException as error:
        loaded.set_exception(error)


def _load_all(
    options: WorkerSettings, opening: AbstractContextManager[object]
) -> "dict[str, Blip2]":
    with START.part("model imports"):
        from blipq_worker.blip2 import FeatureCache
        from blipq_worker.serving import canary

    give_large_blocks_back()  # what is quantized was read in full before
    goldens = _goldens(options) if options.canary else {}
    cache = FeatureCache(options.feature_cache_bytes)
    require_one_device(options)
    device = usable_device(options.device)
    stay_near(device)
    quantization, why = kept_on(device, options)
    log.info("weights: %s", why)
    adapters = _read_adapters(options)
    loaded = {}
    for name, what in options.models.items():
        with _explained(name, options):
            over = list(adapters[name].values())
            model = _load(name, what, options, cache, device, quantization, over)
            if options.compile:
                with START.part("warm-up"):
                    canary.warm(model)
            if options.canary:
                with START.part("canary"):
                    canary.check(model, goldens[name])
        loaded[name] = model
    with START.part("slots and graphs"):
        _open_slots(loaded, options, opening)
    for name, named in adapters.items():
        loaded |= _adapted(name, loaded[name], named, options)
    return loaded


def _read_adapters(options: WorkerSettings) -> dict[str, dict[str, Adapter]]:
    """What adapters hold, by their base and name. Raises AdapterError."""
    found: dict[str, dict[str, Adapter]] = {name: {} for name in options.models}
    for name, (base, folder) in options.adapters.items():
        try:
            found[base][name] = read_adapter(folder)
        except AdapterError as error:
            raise AdapterError(error.code, f"adapter {name!r}: {error.text}") from error
    return found


def _adapted(
    base: str, resident: "Blip2", adapters: Mapping[str, Adapter], options: WorkerSettings
) -> "dict[str, Blip2]":
    """Models for the adapters of a resident one. Raises ModelError where one answers nonsense."""
    from blipq_worker.serving import canary

    found: dict[str, Blip2] = {}
    for number, (name, adapter) in enumerate(adapters.items(), start=1):
        info = replace(
            resident.info,
            checkpoint=":".join(options.adapters[name]),
            revision=f"{resident.info.revision}+{adapter.digest()}",
            load_seconds=0.0,
        )
        found[name] = resident.adapted(number, info)
        log.info(
            "adapter %s over %s: %s, rank %d, %.1f M parameters",
            *(name, base, adapter.folder, adapter.rank, adapter.parameters / 1e6),
        )
        if options.canary:
            with _explained(name, options):
                canary.check(found[name])
    return found


def _goldens(options: WorkerSettings) -> "dict[str, Golden | None]":
    """The golden of each model by its name. Raises ModelError, and S3ModelAway."""
    from blipq_worker.serving.goldens import GoldenError, golden_beside, read_goldens

    try:
        known = read_goldens(options.goldens)
        return {
            name: known.get(what) or golden_beside(served_model(name, what).generation, what)
            for name, what in options.models.items()
        }
    except GoldenError as error:
        raise ModelError(str(error)) from error


def _open_slots(
    models: "Mapping[str, Blip2]",
    options: WorkerSettings,
    opening: AbstractContextManager[object] = nullcontext(),  # noqa: B008
) -> None:
    """Reserves slots for texts in flight on GPUs, once all weights are there.

    Of what these leave, models get equal parts.
    """
    import torch

    from blipq_worker.blip2.decoding.static import free_memory, ways

    devices = {name: torch.device(model.info.device) for name, model in models.items()}
    on_gpus = [name for name in models if devices[name].type == "cuda" and not options.compile]
    if not on_gpus:
        return
    with opening if options.graphs else nullcontext():
        for index, name in enumerate(on_gpus):
            with _explained(name, options):
                budget = free_memory(devices[name]) // (len(on_gpus) - index)
                among = ways(graphs=options.graphs)
                models[name].open_slots(among, slots=options.decode_slots, budget=budget)


def _load(
    name: str,
    what: str,
    options: WorkerSettings,
    cache: "FeatureCache",
    device: str,
    quantization: Kept,
    adapters: Sequence[Adapter] = (),
) -> "Blip2":
    from blipq_worker.blip2 import Blip2
    from blipq_worker.blip2.loading.precision import cpu_has_bfloat16

    served = served_model(name, what)
    if (reason := shortage(options, what, device, quantization)) is not None:
        log.warning("%s", reason)
    if device == "cpu" and options.dtype == "bfloat16" and not cpu_has_bfloat16():
        log.warning("this CPU has no instructions for bfloat16: BLIPQ_DTYPE=float32 is faster here")
    began = time.monotonic()
    model = Blip2.load(
        served.generation,
        served.retrieval,
        quantization=quantization,
        quantize_vision=options.quantize_vision,
        dtype=options.dtype,
        attention=options.attention,
        compiled=options.compile,
        device=device,
        slots=options.growing_slots,
        static=False,  # not before the weights of all models are there
        cache=cache,
        draft=options.jpeg_draft,
        adapters=adapters,
    )
    took = time.monotonic() - began
    # Receipts and indexes name a model as the settings do, not by its folder here.
    local = served.retrieval is not None and Path(served.retrieval).is_dir()
    retrieval = what if local else served.retrieval
    model.info = replace(
        model.info,
        checkpoint=what,
        retrieval_checkpoint=retrieval,
        load_seconds=took,
    )
    return model


def checker(
    options: WorkerSettings, models: "Mapping[str, Blip2]"
) -> "Callable[[str], None] | None":
    """What checks a served model again, by its name, and its adapters; None without BLIPQ_CANARY.

    It raises CanaryError, and whatever the model raises. To be made as long as the keys of models
    in S3 are there. Raises ModelError, and S3ModelAway.
    """
    from blipq_worker.serving import canary

    if not options.canary:
        return None
    goldens = _goldens(options)

    def check(name: str) -> None:
        canary.check(models[name], goldens[name])
        for adapter in (each for each, over in options.adapters.items() if over.base == name):
            try:
                canary.check(models[adapter])
            except canary.CanaryError as error:
                raise canary.CanaryError(f"its adapter {adapter!r}: {error}") from error

    return check


def _checks(what: str | None) -> str:
    """What to check of a model of one's own; "" for those of BLIP-2's authors and the demo's.

    None: an adapter.
    """
    if what == "demo":
        return ""
    generation = "" if what is None else served_model("default", what).generation
    return "" if generation.partition("@")[0] in VARIANTS else f". {FINE_TUNE_CHECKS}"


@contextmanager
def _explained(name: str, options: WorkerSettings) -> Iterator[None]:
    """Whatever keeps a model from being served becomes a ModelError that has the remedy.

    A device that is lost becomes DeviceLost; S3ModelAway stays what it is, and S3ModelError and
    AdapterError keep their codes at the beginning.
    """
    import torch

    from blipq_worker.blip2 import CheckpointError
    from blipq_worker.blip2.loading.checkpoints import CheckpointMissing
    from blipq_worker.serving.canary import CanaryError

    try:
        yield
    except S3ModelAway:
        raise
    except S3ModelError as error:
        raise S3ModelError(error.code, f"model {name!r}: {error.text}") from error
    except AdapterError as error:
        raise AdapterError(error.code, f"model {name!r}: {error.text}") from error
    except CanaryError as error:
        advice = "it is damaged or does not suit these settings (BLIPQ_CANARY=0 serves it)"
        advice += _checks(options.models.get(name))
        raise ModelError(f"model {name!r} failed its check: {error}; {advice}") from error
    except CheckpointMissing as error:
        missing = [each for each in weights_of_served(options.models) if not each.present]
        raise ModelError(f"model {name!r}: {error.what}; {how_to_get(missing)}") from error
    except (CheckpointError, ModelError, ValueError) as error:
        raise ModelError(f"model {name!r}: {error}") from error
    except (torch.OutOfMemoryError, MemoryError) as error:
        reason = (str(error) or "out of memory").splitlines()[0]
        over = options.adapters.get(name)
        base = name if over is None else over.base
        what = options.models.get(base, base)
        smaller = instead(options, what, None, "cpu" if options.device == "cpu" else "cuda")
        advice = f"`blipq models memory {what}` counts what it takes; {smaller}"
        raise ModelError(f"model {name!r} does not fit: {reason}; {advice}") from error
    except Exception as error:  # of libraries that read files, and of a configuration that lies
        log.debug("model %r", name, exc_info=error)
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:500]
        if is_device_fault(error):
            raise DeviceLost(f"model {name!r}: the device is lost: {reason}") from error
        advice = "BLIPQ_LOG_LEVEL=DEBUG shows where"
        raise ModelError(f"model {name!r} cannot be loaded: {reason}; {advice}") from error
