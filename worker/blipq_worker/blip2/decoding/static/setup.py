"""What of static slots a device can run: memory, attention, graphs. Each with something to fall to.

A start never fails here: a kernel that does not compile, a step that cannot be captured or a graph
that chooses other tokens is given up, with one line in the log, for what works.
"""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from blipq_worker.blip2.cuda.capture import CudaCapture, Run
from blipq_worker.blip2.decoding.languages import language_of
from blipq_worker.blip2.decoding.sequences import Row
from blipq_worker.blip2.decoding.static.admission import Admission, AdmissionGraphs
from blipq_worker.blip2.decoding.static.attention.methods import (
    Attention,
    KernelAttention,
    MaskedAttention,
)
from blipq_worker.blip2.decoding.static.graphs import Graphs
from blipq_worker.blip2.decoding.static.groups import MOST_BEAMS, WIDTHS
from blipq_worker.blip2.decoding.static.linears import is_eight_bits
from blipq_worker.blip2.decoding.static.llama import StaticLlama
from blipq_worker.blip2.decoding.static.loop import StaticLoop
from blipq_worker.blip2.decoding.static.opt import StaticOpt
from blipq_worker.blip2.decoding.static.sampler import Sampler, Variant
from blipq_worker.blip2.decoding.static.state import SlotState, packed_params
from blipq_worker.blip2.decoding.static.step import (
    Shape,
    StaticLanguage,
    StaticStep,
    on_device,
)
from blipq_worker.blip2.decoding.static.t5 import StaticT5
from blipq_worker.inference.requests import OnLoop

log = logging.getLogger(__name__)

#: Columns of a slot: prompt and new tokens of nearly all jobs. Longer ones run in ``DecodeLoop``.
COLUMNS = 256
#: The same for InstructBLIP, whose texts have up to 256 new tokens by default.
LONG_COLUMNS = 2 * COLUMNS
#: Slots where no number is given and there is memory for them.
SLOTS = 128
#: The part of free memory that slots may take where no number is given: passes need theirs.
_SHARE = 0.5
#: Queries of an image, for which admissions are captured at the start.
QUERIES = 32
#: Beams of most searches: the default of a job.
_BEAMS = WIDTHS[0]
#: Windows of attention that are captured at the start, where attention has windows.
_WINDOWS = (64, 128)
#: How far scores may be from those in growing slots, by the largest of them. It is to find errors:
#: rounding in 16 bits and in quantized layers adds up to a few hundredths.
_TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.1, torch.bfloat16: 0.1}


class _Unsuitable(RuntimeError):
    """A way of running that does not compute what it should."""


@dataclass(frozen=True, slots=True)
class Way:
    """A way of taking steps. capture: makes what records graphs; None: eagerly."""

    attention: Callable[[], Attention]
    capture: Callable[[], Callable[[Run], Run]] | None

    def __str__(self) -> str:
        name = getattr(self.attention, "name", "?")
        return f"{name} {'eagerly' if self.capture is None else 'in graphs'}"


#: From the fastest to the one that needs least.
WAYS = (
    Way(KernelAttention, CudaCapture),
    Way(MaskedAttention, CudaCapture),
    Way(MaskedAttention, None),
)


def ways(*, graphs: bool) -> tuple[Way, ...]:
    """The ways to try, best first. graphs: the setting."""
    return tuple(way for way in WAYS if graphs or way.capture is None)


def free_memory(device: torch.device) -> int:
    """Bytes that could be allocated on a GPU, with what torch keeps and nobody uses."""
    free, _ = torch.cuda.mem_get_info(device)
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return free + kept


def static_loop(
    model: Any,
    *,
    ends: Sequence[int],
    slots: int | None,
    budget: int,
    among: Sequence[Way],
    columns: int = COLUMNS,
    repetition_penalty: float = 1.0,
) -> StaticLoop | None:
    """A loop in static slots by the first way that works; None where none does.

    model: a language model, on its device. slots: None takes up to SLOTS, by ``budget``: bytes that
    are free, of which other models have their share. repetition_penalty: that of most jobs, whose
    graphs are captured at the start.
    """
    language = _language(model)
    if language is None:
        log.info("decoding: no static slots for %s", type(model).__name__)
        return None
    device = model.get_input_embeddings().weight.device
    with on_device(device), torch.inference_mode():
        state = _reserved(language, slots, budget, columns, device)
        if state is None:
            log.warning("decoding: no memory for static slots; it grows with the texts")
            return None
        stopping = model.generation_config.early_stopping or False
        sampler = Sampler(ends, language.start, language.vocabulary, device, stopping)
        usual = _Greedy(repetition_penalty=repetition_penalty)
        loop = _first_that_works(model, language, sampler, state, among, usual)
    if loop is None:
        language.release()
    return loop


def _first_that_works(
    model: Any,
    language: StaticLanguage,
    sampler: Sampler,
    state: SlotState,
    among: Sequence[Way],
    usual: "_Greedy",
) -> StaticLoop | None:
    given_up: list[str] = []
    for way in among:
        started = time.monotonic()
        try:
            step = StaticStep(language, sampler, state, way.attention())
            loop, graphs = _opened(model, step, way, usual)
            loop.way = str(way)
        except Exception as error:
            given_up.append(f"{way}: {type(error).__name__}: {error}".splitlines()[0])
            continue
        finally:
            state.clear()
        log.info(
            "decoding: %d slots, %.2f GiB, %s, %d graphs, %.1f s%s",
            *(len(state.tokens), loop.bytes / 2**30, way, graphs, time.monotonic() - started),
            "".join(f"; given up: {each}" for each in given_up),
        )
        return loop
    log.warning("decoding: no static slots: %s", "; ".join(given_up))
    return None


def _language(model: Any) -> StaticLanguage | None:
    kinds: tuple[Any, ...] = (StaticT5, StaticLlama, StaticOpt)
    return next((kind(model) for kind in kinds if kind.can_run(model)), None)


def _reserved(
    language: StaticLanguage, slots: int | None, budget: int, columns: int, device: torch.device
) -> SlotState | None:
    """The state of as many slots as there is memory for, which is reserved; None if for none."""
    columns = min(columns, language.longest)
    if slots is None:
        slots = min(SLOTS, int(_SHARE * budget) // language.slot_bytes(columns))
    while slots > 0:
        try:
            language.reserve(slots, columns, device)
            return SlotState.empty(slots, columns, language.vocabulary, device)
        except torch.OutOfMemoryError:
            language.release()
        slots //= 2
    return None


def _opened(model: Any, step: StaticStep, way: Way, usual: "_Greedy") -> tuple[StaticLoop, int]:
    """A loop that takes its steps so, after they were checked; and the number of its graphs."""
    if isinstance(step.attention, KernelAttention):
        _require_same_attention(step)
    _require_same_scores(model, step)
    if way.capture is None:
        if _has_eight_bits(model):
            raise _Unsuitable("8 bits are slower so than in growing slots")
        return StaticLoop(step), 0
    _occupy(step, usual)
    capture = way.capture()
    graphs = Graphs(step, capture)
    *larger, smallest = _shapes(step, usual)
    graphs.prepare(smallest)  # what cannot be captured at all is found out here
    graphs.attempt(_largest(step))
    for shape in larger:
        if shape.variant.beams:
            graphs.attempt(shape)
        else:
            graphs.prepare(shape)
    admission = AdmissionGraphs(Admission(step), capture)
    (row,) = _random_rows(model, 1, QUERIES)
    slots = len(step.state.tokens)
    row.params = usual
    admission.prepare(row, slots // 2)
    if slots >= _BEAMS:
        row.params = replace(usual, num_beams=_BEAMS)
        admission.prepare(row, slots // _BEAMS)
    step.groups.clear()
    return StaticLoop(step, graphs, admission), len(graphs) + len(admission)


def _occupy(step: StaticStep, usual: "_Greedy") -> None:
    """Live sequences of several lengths in all slots: what graphs choose is held against steps.

    To steps with beams the first ones are beams of a few groups.
    """
    state, dice = step.state, torch.Generator().manual_seed(3)
    count, longest = len(state.tokens), min(_WINDOWS[0], step.language.columns)
    row = Row(torch.empty((0, 1)), [], replace(usual, max_new_tokens=longest))
    state.params.copy_(torch.tensor([packed_params(row)] * count))
    state.tokens.copy_(torch.randint(step.sampler.vocabulary, (count,), generator=dice))
    state.positions.copy_(torch.randint(1, longest, (count,), generator=dice))
    state.live.fill_(True)
    _occupy_groups(step, longest)


def _occupy_groups(step: StaticStep, longest: int) -> None:
    groups, slots = step.groups, torch.arange(len(step.state.tokens) // _BEAMS * _BEAMS)
    count, beams = len(slots) // _BEAMS, groups.beams
    groups.number[: len(slots)] = (slots // _BEAMS + 1).to(groups.number.device)
    groups.rank[: len(slots)] = (slots % _BEAMS).to(groups.rank.device)
    groups.members[:count, :_BEAMS] = slots.view(count, _BEAMS).to(groups.members.device)
    groups.ancestry.copy_(torch.arange(len(step.state.tokens))[:, None].expand_as(groups.ancestry))
    beams.beams.fill_(_BEAMS)
    beams.limit.fill_(longest)
    beams.count.fill_(1)
    beams.scores[:, :_BEAMS] = -torch.arange(1.0, _BEAMS + 1, device=beams.scores.device)


def _largest(step: StaticStep) -> Shape:
    """The shape that takes most memory. It is captured first: all others live in its memory."""
    slots, columns = len(step.state.tokens), step.language.columns
    beams = MOST_BEAMS if slots > 1 else 0
    variant = Variant(penalties=True, window=step.sampler.vocabulary, beams=beams)
    return Shape(slots, columns, variant)


def _shapes(step: StaticStep, usual: "_Greedy") -> Iterator[Shape]:
    """What is captured at the start, the largest first: greedy steps of all buckets, and those of
    which some are beams; all with the usual penalty, if there is one.
    """
    slots, columns = len(step.state.tokens), step.language.columns
    windows = [each for each in _WINDOWS if each < columns] if step.attention.windows else [columns]
    alone = Variant.of([usual], step.sampler.vocabulary)
    buckets = {slots, *(1 << power for power in range((slots - 1).bit_length()))}
    for bucket in sorted(buckets, reverse=True):
        for window in windows:
            if bucket >= _BEAMS:
                yield Shape(bucket, window, alone._replace(beams=_BEAMS))
            yield Shape(bucket, window, alone)


def _require_same_attention(step: StaticStep) -> None:
    """The kernel must find what torch finds, on random numbers, also of beams; with T5's bias."""
    language, device = step.language, step.state.tokens.device
    dice = torch.Generator().manual_seed(1)
    heads, size, columns = language.heads, language.size, 80

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=dice).to(device, language.dtype)

    new, cache = random(3, 3, heads, size), random(2, 3, heads, columns, size)
    apart = torch.tensor([0, 37, columns - 1], device=device)
    # Beams are at one position: what one of them writes in a step is in nobody's past.
    together = torch.full_like(apart, columns - 1)
    slots = torch.randint(3, (3, columns), generator=dice, dtype=torch.int32).to(device)
    bias = random(heads, columns) if isinstance(language, StaticT5) else None
    for positions, ancestry in ((apart, None), (together, slots)):
        found = []
        for attention in (MaskedAttention(), step.attention):
            prepared = attention.prepare(positions, columns, language.dtype, bias, ancestry)
            found.append(attention(new, cache.clone(), prepared, size**-0.5))
        _require_close(found[0], found[1], "numbers of its attention", _TOLERANCE[language.dtype])


def _require_same_scores(model: Any, step: StaticStep) -> None:
    """A step must find the scores that growing slots find, for a few sequences."""
    rows = _random_rows(model, min(3, len(step.state.tokens)))
    for row in rows:  # one that ended with its first token would not move on
        row.params = _Greedy(min_new_tokens=1)
    growing = language_of(model)
    scores, filled = growing.prefill(rows)
    loop = StaticLoop(step)
    loop.join(rows)
    growing.put(growing.alone, [], rows, filled, slice(len(rows)))
    for row, token in zip(rows, scores.argmax(-1).tolist(), strict=True):
        row.tokens = [token]
    expected = growing.step(rows, slice(len(rows)), None)
    state = step.state.first(len(rows))
    state.tokens.copy_(torch.tensor([row.tokens[0] for row in rows]))
    window = min(_WINDOWS[0], step.language.columns)
    found = step.language.step(state, step.attention, window)
    loop.leave(rows)
    tolerance = _TOLERANCE[torch.float16 if _has_eight_bits(model) else step.language.dtype]
    _require_close(expected, found, "its scores", tolerance)


def _has_eight_bits(model: Any) -> bool:
    return any(is_eight_bits(layer) for layer in model.modules())


def _require_close(
    expected: torch.Tensor, found: torch.Tensor, what: str, tolerance: float
) -> None:
    apart = (expected.float() - found.float()).abs().max()
    if not bool(apart <= tolerance * expected.float().abs().max()):  # not with NaN either
        raise _Unsuitable(f"{what} are off by {float(apart):.3g}")


def _random_rows(model: Any, count: int, length: int = 16) -> list[Row]:
    """Sequences of several lengths about nothing."""
    embeddings = model.get_input_embeddings().weight
    dice = torch.Generator().manual_seed(2)
    queries = torch.randn((count, length, embeddings.shape[1]), generator=dice) * 0.5
    queries = queries.to(embeddings.device, embeddings.dtype)
    return [Row(queries[index], [2] * (1 + 3 * index), _Greedy()) for index in range(count)]


@dataclass(frozen=True, slots=True)
class _Greedy:
    """The parameters of a check."""

    max_new_tokens: int = 8
    min_new_tokens: int = 0
    do_sample: bool = False
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    num_beams: int = 1
    length_penalty: float = 1.0
    num_return_sequences: int = 1
    on_loop: OnLoop = "keep"
