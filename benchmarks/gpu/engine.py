"""The model's side alone: what the card gives to blipq's engine, and to plain ``generate``.

Each function is a section. ``Card`` holds one model at a time, with weights made on the card.
"""

import gc
import io
import json
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from benchmarks.gpu.pictures import drawn
from benchmarks.gpu.weights import Name, made_here, write_folder
from blipq_worker.blip2 import Blip2, GenerateItem, Pixels
from blipq_worker.blip2.loading.quantizing import Quantization
from blipq_worker.engine.backend import Engine
from blipq_worker.images.preprocess import pixels_of as resized_by
from blipq_worker.inference.interface import Inference
from blipq_worker.inference.local import LocalInference
from blipq_worker.inference.requests import Generate, GenerationParams, ImagePixels
from blipq_worker.serving.footprint import GIB, Load, memory_of

TOKENS = 20
GREEDY = GenerationParams(num_beams=1, max_new_tokens=TOKENS, min_new_tokens=TOKENS)
BEAMS = GenerationParams(max_new_tokens=TOKENS, min_new_tokens=TOKENS)
LONG = GenerationParams(num_beams=1, max_new_tokens=60, min_new_tokens=60)
PUBLISHED = {"opt-2.7b": "Salesforce/blip2-opt-2.7b", "flan-t5-xl": "Salesforce/blip2-flan-t5-xl"}


def batch_size(slots: int) -> int:
    """What a worker with so many slots is given as BLIPQ_MAX_BATCH_SIZE."""
    return max(1, slots // 2)


def synchronize() -> None:
    """Waits for the card."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def median_ms(run: Callable[[], object], times: int = 10, warm: int = 3) -> float:
    """Milliseconds of a call, the card's work included."""
    for _ in range(warm):
        run()
    took = []
    for _ in range(times):
        synchronize()
        started = time.perf_counter()
        run()
        synchronize()
        took.append(1000 * (time.perf_counter() - started))
    return sorted(took)[times // 2]


@dataclass
class Card:
    """The device, the sizes that fit it, and the model on it."""

    folder: Path
    tiny: bool
    _model: tuple[Any, Blip2] | None = field(default=None, repr=False)

    @property
    def device(self) -> str:
        """Where models run."""
        return "cuda" if torch.cuda.is_available() else "cpu"

    def sizes(self, *wanted: int) -> list[int]:
        """Batch sizes: few of them in a dry run."""
        return [each for each in wanted if each <= 8] if self.tiny else list(wanted)

    def load(self, name: Name, *, slots: int, quantization: Quantization = "none") -> Blip2:
        """A model with made weights; the one before is let go."""
        key = name, slots, quantization
        if self._model is None or self._model[0] != key:
            self._model = None
            self.clear()
            folder = write_folder(self.folder / name, name, tiny=self.tiny)
            with made_here():
                model = Blip2.load(
                    folder,
                    quantization=quantization,
                    device=self.device,
                    slots=slots,
                )
            self._model = key, model
        return self._model[1]

    def clear(self) -> None:
        """Gives the card's memory back."""
        self._model = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def pixels_of(model: Blip2, count: int) -> list[Pixels]:
    """Pictures ready for the model, each to be looked at."""
    made = [model.preprocess(_picture(seed)) for seed in range(min(count, 16))]
    return [fresh(made[number % len(made)]) for number in range(count)]


def fresh(pixels: Pixels) -> Pixels:
    """The same picture, as if nobody had looked at it."""
    return Pixels(pixels.generation, pixels.retrieval)


def _picture(seed: int) -> Image.Image:
    return Image.open(io.BytesIO(drawn("coco", seed))).convert("RGB")


# -- captions a second --


def throughput(
    card: Card,
    name: Name,
    params: GenerationParams,
    *,
    slots: int,
    seconds: float,
    python_threads: int = 0,
    quantization: Quantization = "none",
) -> dict[str, Any]:
    """Captions a second through the engine, with twice as many submitted as it runs."""
    slots = 8 if card.tiny else slots
    model = card.load(name, slots=slots, quantization=quantization)
    engine = Engine(
        {"default": model},
        max_batch_size=batch_size(slots),
        batch_wait_timeout_s=0.005,
        max_waiting=2 * slots,
    )
    engine.batcher.start()
    images = [
        ImagePixels(pixels=resized_by(_picture(seed), model.info.recipes)) for seed in range(16)
    ]
    with burning(python_threads):
        per_s = _keep_full(LocalInference(engine), images, params, slots, seconds=seconds)
    engine.batcher.close(timeout=60)
    return {"per_s": per_s, "slots": slots, "python_threads": python_threads}


def _keep_full(
    inference: Inference,
    images: Sequence[ImagePixels],
    params: GenerationParams,
    slots: int,
    *,
    seconds: float,
) -> float:
    """Captions a second: each that ends makes room for the next; the rest is cancelled."""
    room = threading.Semaphore(2 * slots)
    times: list[float] = []
    failed: list[BaseException] = []

    def end(future: "Future[Any]") -> None:
        if not future.cancelled():
            times.append(time.monotonic())
            failed.extend(filter(None, [future.exception()]))
        room.release()

    futures, started = [], time.monotonic()
    while not _long_enough(times, slots, seconds):
        if failed:
            raise failed[0]
        if time.monotonic() - started > 10 * seconds:
            raise TimeoutError(f"{len(times)} captions in {10 * seconds:.0f} s")
        if room.acquire(timeout=0.1):
            pixels = images[len(futures) % len(images)].pixels
            item = Generate(ImagePixels(pixels=pixels), ("",), params)  # of a job of its own
            futures.append(inference.submit("default", item, "normal"))
            futures[-1].add_done_callback(end)
    rate = (len(times) - slots) / (times[-1] - times[slots - 1])
    for future in futures:
        future.cancel()
    return rate


def _long_enough(times: Sequence[float], slots: int, seconds: float) -> bool:
    """Whether captions ended for so many seconds after the first ``slots``, which end as one."""
    return len(times) > slots and times[-1] - times[slots - 1] >= seconds


@contextmanager
def burning(threads: int) -> Iterator[None]:
    """Threads beside that run Python half of the time, as a worker's jobs do."""
    stop = threading.Event()

    def burn() -> None:
        while not stop.is_set():
            until = time.thread_time() + 0.0002
            while time.thread_time() < until:
                json.loads('[1, 2, 3, {"a": "b"}]')
            time.sleep(0.0002)

    running = [threading.Thread(target=burn, daemon=True) for _ in range(threads)]
    for each in running:
        each.start()
    try:
        yield
    finally:
        stop.set()
        for each in running:
            each.join()


def plain_generate(card: Card, num_beams: int, batches: Sequence[int]) -> dict[str, Any]:
    """Captions a second of a user's own loop over transformers' ``generate``, by batch."""
    model = card.load("opt-2.7b", slots=8 if card.tiny else 128)
    blip2 = model.generator.model
    side, queries = model.info.image_size, 32
    found = {}
    for batch in card.sizes(*batches):
        images = torch.randn(batch, 3, side, side, device=blip2.device, dtype=blip2.dtype)
        ids = [blip2.config.image_token_index] * queries + model.generator.ids("")
        prompt = torch.tensor([ids] * batch, device=blip2.device)
        options = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "num_beams": num_beams}

        @torch.inference_mode()
        def caption(images: Any = images, prompt: Any = prompt, options: Any = options) -> None:
            blip2.generate(pixel_values=images, input_ids=prompt, do_sample=False, **options)

        took = median_ms(caption, times=2, warm=1)
        found[str(batch)] = {"ms": took, "per_s": 1000 * batch / took}
    return found


# -- passes and steps against the roofline --


def peaks(card: Card) -> dict[str, float]:
    """What the device reads and computes in a second, and what launching a kernel costs."""
    large = torch.ones(2**24 if card.tiny else 2**30, dtype=torch.float16, device=card.device)
    side, dtype = (512, torch.float32) if card.tiny else (8192, torch.float16)
    matrix = torch.randn(side, side, device=card.device).to(dtype)
    one, launches = torch.ones(1, device=card.device), 2000

    def launch() -> None:
        total = one
        for _ in range(launches):
            total = total + one

    return {
        "gb_per_s": large.nbytes / median_ms(large.sum, 5) / 1e6,
        "tflops": 2 * side**3 / median_ms(lambda: matrix @ matrix, 5) / 1e9,
        "us_a_launch": 1000 * median_ms(launch, 3, 1) / launches,
    }


def steps(
    card: Card,
    name: Name,
    counts: Sequence[int],
    peak: Mapping[str, float],
    quantization: Quantization = "none",
) -> dict[str, Any]:
    """Milliseconds of a step of a session, by its sequences, and their share of the roofline."""
    if card.tiny:
        counts = sorted({min(each, 8) for each in counts})
    model = card.load(name, slots=max(counts), quantization=quantization)
    language = model.generator.model.language_model
    read = sum(weight.nbytes for weight in _read_by_a_step(language))
    least = read / peak["gb_per_s"] / 1e6
    found = {}
    for count in counts:
        with writing(model, count) as step:
            took = median_ms(step, 10, 3)
        found[str(count)] = {"ms": took, "least_ms": least, "share": least / took}
    return found


@contextmanager
def writing(model: Blip2, count: int) -> Iterator[Callable[[], object]]:
    """So many sequences write in a session; yields what takes one step of all of them."""
    session = model.session()
    tickets = [(1, number) for number in range(count)]
    for ticket, pixels in zip(tickets, pixels_of(model, count), strict=True):
        session.join(ticket, GenerateItem(pixels, ("",), LONG))
    for _ in range(3 + count // 16):  # they get their slots, some at each step
        session.step(tickets)
    yield lambda: session.step(tickets)
    for ticket in tickets:
        session.leave(ticket)


def step_profile(card: Card) -> dict[str, float]:
    """Kernels of a step of 32 sequences, how long they keep the card busy, and the host's waits."""
    count = card.sizes(8, 32)[-1]
    model = card.load("opt-2.7b", slots=8 if card.tiny else 128)
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] * torch.cuda.is_available()
    with writing(model, count) as step, warnings.catch_warnings(record=True) as told:
        with torch.profiler.profile(activities=activities) as profile:
            step()
            synchronize()
        warnings.simplefilter("always")
        if torch.cuda.is_available():
            torch.cuda.set_sync_debug_mode("warn")
        step()
        if torch.cuda.is_available():
            torch.cuda.set_sync_debug_mode("default")
    on_card = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return {
        "kernels": len(on_card),
        "busy_ms": sum(event.device_time for event in on_card) / 1000,
        "syncs": sum("synchron" in str(each.message) for each in told),
    }


def _read_by_a_step(language: Any) -> Iterator[torch.Tensor]:
    """The weights of a language model that each step reads, its output layer included."""
    if language.config.is_encoder_decoder:
        yield from language.decoder.block.parameters()
        yield language.lm_head.weight
    else:
        yield from language.parameters()


def looks(card: Card, counts: Sequence[int], peak: Mapping[str, float]) -> dict[str, Any]:
    """Milliseconds from pixels to what the language model reads, by images."""
    model = card.load("opt-2.7b", slots=8 if card.tiny else 128)
    flops = 533e9 * (1e-4 if card.tiny else 1)  # of one image of 224 px: tower and Q-Former
    found = {}
    for count in card.sizes(*counts):
        pixels = pixels_of(model, count)
        took = median_ms(
            lambda p=pixels: model.generator.project([fresh(each) for each in p]),  # type: ignore[misc]
            5,
            2,
        )
        least = count * flops / peak["tflops"] / 1e9
        found[str(count)] = {"ms": took, "least_ms": least, "share": least / took}
    return found


def memory(card: Card, quantization: Quantization) -> dict[str, float]:
    """GiB on the card after captions of both kinds, and what ``blipq models memory`` counts."""
    slots = 8 if card.tiny else 128
    model = card.load("opt-2.7b", slots=slots, quantization=quantization)
    for params in (GREEDY, BEAMS):
        model.generate([GenerateItem(each, ("",), params) for each in pixels_of(model, 16)])
    counted = memory_of(
        PUBLISHED["opt-2.7b"], quantization=quantization, load=Load(slots=slots)
    ).total
    on_card = torch.cuda.is_available()
    return {
        "counted_gib": counted / GIB,
        "peak_gib": torch.cuda.max_memory_allocated() / GIB if on_card else 0.0,
        "reserved_gib": torch.cuda.max_memory_reserved() / GIB if on_card else 0.0,
    }
