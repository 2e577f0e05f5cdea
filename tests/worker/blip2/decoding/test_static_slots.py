"""Static slots write what growing slots and ``generate`` write, without waiting for the device."""

import importlib
import itertools
import logging
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import bitsandbytes
import pytest
import torch
from msgspec.structs import replace
from transformers import OPTForCausalLM

from blipq_worker.blip2 import Blip2
from blipq_worker.blip2.cuda.capture import Run
from blipq_worker.blip2.decoding import DecodeLoop, Row
from blipq_worker.blip2.decoding import static as static_package
from blipq_worker.blip2.decoding.sampling import ScoresError
from blipq_worker.blip2.decoding.static import StaticLoop, Way, setup, static_loop
from blipq_worker.blip2.decoding.static.admission import Admission, AdmissionGraphs
from blipq_worker.blip2.decoding.static.attention.methods import KernelAttention, MaskedAttention
from blipq_worker.blip2.decoding.static.graphs import Graphs
from blipq_worker.blip2.decoding.static.linears import EightBits, fused
from blipq_worker.blip2.decoding.static.llama import StaticLlama
from blipq_worker.blip2.decoding.static.opt import StaticOpt
from blipq_worker.blip2.decoding.static.sampler import Sampler, Variant
from blipq_worker.blip2.decoding.static.state import PARAMS, SlotState
from blipq_worker.blip2.decoding.static.step import Shape, StaticStep
from blipq_worker.blip2.decoding.static.t5 import StaticT5
from blipq_worker.blip2.generation import generator as generation
from blipq_worker.blip2.generation.routing import RoutedLoop
from blipq_worker.inference.requests import GenerationParams
from blipq_worker.serving import loader as load
from blipq_worker.settings import WorkerSettings
from worker import tiny_models
from worker.card import Card
from worker.in_flight import GREEDY, alone, every_penalty, rows, write

EAGER = Way(MaskedAttention, None)
#: Stands in for graphs: what it records is run again as it is.
RECORDED = Way(MaskedAttention, lambda: lambda run: run)
VARIANTS = [
    *(Variant(), Variant(True, 0), Variant(False, 64), Variant(True, 1024), Variant(True, 64)),
    *(Variant(beams=5), Variant(True, 0, 16), Variant(True, 64, 5), Variant(False, 1024, 16)),
]


def static(model: Blip2, slots: int, way: Way = EAGER) -> StaticLoop:
    generator = model.generator
    return opened(generator.model.language_model, slots, generator._eos, way)


def opened(model: Any, slots: int, ends: Sequence[int] = (), way: Way = EAGER) -> StaticLoop:
    loop = static_loop(model, ends=ends, slots=slots, budget=0, among=[way])
    assert loop is not None
    return loop


def anew(some: Sequence[Row]) -> list[Row]:
    return [Row(row.queries, row.ids, row.params, row.seed) for row in some]


def written(loop: Any, some: Sequence[Row], **options: Any) -> list[list[int]]:
    fresh = anew(some)
    write(loop, fresh, **options)
    return [row.tokens for row in fresh]


@pytest.fixture(scope="module")
def plain_opt() -> Any:
    """An OPT with layers that nobody packed and 2,048 positions, as the published ones."""
    torch.manual_seed(3)
    model = tiny_models.plain_opt(1500, positions=2048, spread=0.3)
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def plain_llama() -> Any:
    """Whose heads share keys in pairs."""
    torch.manual_seed(3)
    model = tiny_models.plain_llama(1500, positions=2048, spread=0.3, sharing=2)
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def plain_t5() -> Any:
    torch.manual_seed(3)
    return tiny_models.plain_t5(1500, spread=2.0).eval().requires_grad_(False)


@pytest.fixture(params=["plain_opt", "plain_llama", "plain_t5"])
def plain(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)


def of_all_kinds(model: Any, number: int, seed: int, longest: int = 40) -> list[Row]:
    """Greedy and sampled, with all parameters in any combination."""
    dice, numbers = random.Random(seed), torch.Generator().manual_seed(seed)
    width = model.get_input_embeddings().weight.shape[1]
    return [
        Row(
            torch.randn(32, width, generator=numbers),
            [dice.randrange(4, 1500) for _ in range(dice.randrange(1, 20))],
            of_some_kind(dice, dice.randint(1, longest)),
            dice.getrandbits(62),
        )
        for _ in range(number)
    ]


def of_some_kind(dice: random.Random, limit: int) -> GenerationParams:
    return GenerationParams(
        num_beams=1,
        max_new_tokens=limit,
        min_new_tokens=dice.choice([0, 0, dice.randint(0, limit)]),
        do_sample=dice.random() < 0.5,
        temperature=dice.uniform(0.3, 2.5),
        top_p=dice.choice([0.5, 0.9, 0.98, 1.0]),
        top_k=dice.choice([0, 1, 5, 50, 200, 1000, 5000]),
        repetition_penalty=dice.choice([1.0, 1.0, 0.8, 1.3]),
        no_repeat_ngram_size=dice.choice([0, 0, 1, 2, 3, 5, 32]),
    )


# --- the tokens -----------------------------------------------------------------------------------


def test_every_penalty_gives_the_tokens_of_generate_whatever_the_number_of_slots(
    any_model: Blip2,
) -> None:
    some = rows(any_model, every_penalty(20))
    expected = [alone(any_model, row) for row in some]
    assert len({tuple(tokens) for tokens in expected}) > 12, "the model says the same to everything"
    for slots, way in ((1, EAGER), (3, RECORDED), (8, EAGER)):
        assert written(static(any_model, slots, way), some) == expected


@pytest.mark.parametrize("seed", range(3))
def test_rows_of_all_kinds_write_what_they_write_in_growing_slots(plain: Any, seed: int) -> None:
    """With joins, leaves and held steps at random, in slots that others were in before."""
    dice, ends = random.Random(seed), (5, 9, 11)
    some = of_all_kinds(plain, 60, seed)
    expected = {row: written(DecodeLoop(plain, ends=ends, slots=1), [row])[0] for row in some}
    assert len({tuple(tokens) for tokens in expected.values()}) > 50
    loop, todo, given_up = opened(plain, 7, ends, RECORDED), list(some), set()
    while todo or loop.running:
        coming: list[Row] = []
        while todo and loop.fits(todo[0], coming) and dice.random() < 0.7:
            coming.append(todo.pop())
        loop.join(coming)
        loop.step([row for row in loop.running if not row.ended and dice.random() < 0.9])
        gone = {row for row in loop.running if not row.ended and dice.random() < 0.02}
        given_up |= gone
        loop.leave([row for row in loop.running if row.ended or row in gone])
    for row, tokens in expected.items():
        assert row.tokens == (tokens[: len(row.tokens)] if row in given_up else tokens)
    assert 0 < len(given_up) < 40


def test_a_late_token_never_reaches_who_has_the_slot_next(plain: Any) -> None:
    """A row leaves while its step is under way, and the next one takes its slot at once."""
    long = replace(GREEDY, max_new_tokens=20, min_new_tokens=20)
    stays, *others = (replace_params(row, long) for row in of_all_kinds(plain, 4, 8))
    expected = {
        row: written(DecodeLoop(plain, ends=(), slots=1), [row])[0] for row in (stays, *others)
    }
    loop = opened(plain, 2)
    loop.join([stays])
    for row in others[:2]:
        loop.join([row])
        loop.step([stays, row])
        loop.step([stays, row])
        loop.leave([row])
        assert row.tokens == expected[row][:2], "two of three were read"
    write(loop, others[2:])
    assert [row.tokens for row in (stays, others[2])] == [expected[stays], expected[others[2]]]
    assert [len(row.tokens) for row in others[:2]] == [2, 2]


def test_a_slot_that_is_left_stands_still(plain: Any) -> None:
    """It would run past its last column."""
    long = replace(GREEDY, max_new_tokens=20, min_new_tokens=20)
    first, second = (replace_params(row, long) for row in of_all_kinds(plain, 2, 8))
    loop = opened(plain, 2)
    loop.join([first, second])
    loop.step([first, second])
    loop.leave([first])
    for _ in range(3):
        loop.step([second])
    state = step_of(loop).state
    assert state.live.tolist() == [False, True]
    assert state.positions[0] == 0
    assert state.written[0] == 2


def replace_params(row: Row, params: GenerationParams) -> Row:
    return Row(row.queries, row.ids, params, row.seed)


def test_a_step_that_nobody_needs_is_not_launched(plain: Any) -> None:
    """At their limits rows end, and the host knows it before it has read their last tokens."""
    three = replace(GREEDY, max_new_tokens=3, min_new_tokens=3)
    row = replace_params(of_all_kinds(plain, 1, 2)[0], three)
    loop = opened(plain, 2)
    launched: list[Shape] = []
    run = loop._run
    loop._run = lambda shape: (launched.append(shape), run(shape))[1]
    write(loop, [row])
    assert len(row.tokens) == 3
    assert len(launched) == 2, "the first token comes from the prompt"


def test_a_step_covers_the_slots_in_use_and_no_more(plain: Any) -> None:
    some = [replace_params(row, GREEDY) for row in of_all_kinds(plain, 6, 2)]
    loop = opened(plain, 12)
    buckets: list[int] = []
    run = loop._run
    loop._run = lambda shape: (buckets.append(shape.slots), run(shape))[1]
    loop.join(some)
    loop.step(some)
    loop.step(some[:1])
    loop.leave(some[3:])
    loop.step(some[:3])
    loop.leave(some)
    loop.join(anew(some) + anew(some[:3]))
    loop.step(loop.running)
    assert buckets == [8, 1, 4, 12]


# --- limits ---------------------------------------------------------------------------------------


def routed(model: Any, slots: int = 4) -> RoutedLoop:
    return RoutedLoop(opened(model, slots), DecodeLoop(model, ends=(), slots=slots))


def test_the_longest_texts_run_beside_short_ones(plain: Any) -> None:
    """512 new tokens after 1,500 of a prompt: 2,044 positions."""
    limit = replace(GREEDY, max_new_tokens=512, min_new_tokens=512)
    long, *short = of_all_kinds(plain, 4, 6)
    long = Row(long.queries, [7] * 1500, limit)
    expected = [*written(DecodeLoop(plain, ends=(), slots=1), [long])]
    expected += [written(DecodeLoop(plain, ends=(), slots=1), [row])[0] for row in short]
    assert written(routed(plain), [long, *short]) == expected
    assert len(expected[0]) == 512


def test_a_slot_may_be_filled_to_its_last_column(plain_opt: Any, plain_t5: Any) -> None:
    for model, prompt, new in ((plain_opt, 100, 256 - 132 + 1), (plain_t5, 96, 128)):
        params = replace(GREEDY, max_new_tokens=new, min_new_tokens=new)
        row = Row(torch.randn(32, 32), [7] * prompt, params)
        loop = opened(model, 2)
        assert loop.fits(row)
        expected = written(DecodeLoop(model, ends=(), slots=1), [row])
        assert written(loop, [row]) == expected
        assert not loop.suits(replace_params(row, replace(params, max_new_tokens=new + 1)))


def test_ngrams_and_draws_reach_their_limits(plain: Any) -> None:
    dice = random.Random(4)
    some = []
    for row in of_all_kinds(plain, 12, 12):
        limit = replace(
            of_some_kind(dice, 90),
            min_new_tokens=90,
            no_repeat_ngram_size=dice.choice([1, 31, 32, 33]),
            top_k=dice.choice([999, 1000, 1024, 1025, 0]),
            do_sample=dice.random() < 0.5,
            temperature=0.2,
        )
        some.append(replace_params(row, limit))
    expected = [written(DecodeLoop(plain, ends=(), slots=1), [row])[0] for row in some]
    assert written(routed(plain), some) == expected


def test_a_vocabulary_smaller_than_the_windows_is_looked_at_as_a_whole() -> None:
    def windows(vocabulary: int, *top_k: int) -> list[int]:
        return [Variant.of([replace(SAMPLE, top_k=k)], vocabulary).window for k in top_k]

    assert windows(60, 0, 5, 59, 60, 1000) == [60] * 5
    assert windows(1500, 0, 64, 65, 1024, 1025) == [1500, 64, 1024, 1024, 1500]


SAMPLE = replace(GREEDY, do_sample=True)


# --- no waiting -----------------------------------------------------------------------------------


def step_of(loop: StaticLoop) -> StaticStep:
    return loop._step


def test_a_step_takes_nothing_from_the_host_and_gives_it_nothing(plain: Any) -> None:
    step = step_of(opened(plain, 4, (5, 9)))
    with Card() as card, torch.inference_mode():
        for variant in [*VARIANTS, Variant(True, 1500)]:
            step(Shape(4, 64, variant))
    assert (card.waits, card.sent) == ([], 0)


@pytest.mark.parametrize(
    ("language", "model"),
    [
        (StaticOpt, partial(tiny_models.plain_opt, 1500, positions=2048, spread=0.3)),
        (StaticLlama, partial(tiny_models.plain_llama, 1500, positions=2048, spread=0.3)),
        (StaticT5, partial(tiny_models.plain_t5, 1500, spread=2.0)),
    ],
)
def test_steps_and_joins_run_where_no_number_can_be_read(language: Any, model: Any) -> None:
    """On the device that has shapes only, and with no tensor of the host among its own."""
    device = torch.device("meta")
    with device:
        static = language(model().eval())
    with torch.inference_mode():
        static.reserve(8, 256, device)
        state = SlotState.empty(8, 256, static.vocabulary, device)
        sampler = Sampler((5, 9), static.start, static.vocabulary, device)
        step = StaticStep(static, sampler, state, MaskedAttention())
        queries = torch.empty(3, 32, 32, device=device)
        for variant in [*VARIANTS, Variant(True, static.vocabulary)]:
            step(Shape(8, 64, variant))
            numbers = 2 + max(1, variant.beams) + PARAMS + 8
            table = torch.empty(3, numbers, dtype=torch.long, device=device)
            assert Admission(step).run(table, queries, variant).is_meta
        numbers = torch.ones(2, dtype=torch.long, device=device)
        assert step.groups.results(numbers, 5).is_meta
        step.release(numbers)
        assert step.chosen.is_meta


# --- failing alone --------------------------------------------------------------------------------


def poisoned(row: Row) -> Row:
    return Row(torch.full_like(row.queries, float("nan")), row.ids, row.params)


def test_a_row_without_finite_scores_fails_alone_and_leaves_no_trace(either: Blip2) -> None:
    params = replace(GREEDY, max_new_tokens=8, min_new_tokens=8)
    first, bad, third, next_one = rows(either, [params] * 4)
    bad = poisoned(bad)
    loop = static(either, 3)
    loop.join([first, bad, third])
    loop.step([first, bad, third])
    with pytest.raises(ScoresError):
        loop.step([first, bad, third])
    with pytest.raises(ScoresError):
        loop.step([bad])
    loop.step([third])
    assert bad.tokens == []
    loop.leave([bad])
    write(loop, [next_one])
    for row in (first, third, next_one):
        assert row.tokens == alone(either, row)


def test_a_join_that_raises_changes_nothing(either: Blip2, monkeypatch: pytest.MonkeyPatch) -> None:
    some = rows(either, every_penalty(6))
    loop = static(either, 6)
    loop.join(some[:2])
    with monkeypatch.context() as patch:

        def full(*args: Any, **kwargs: Any) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory")

        patch.setattr(step_of(loop).language, "put", full)
        with pytest.raises(torch.OutOfMemoryError):
            loop.join(some[2:])
    assert loop.running == some[:2]
    assert loop.free == 4
    write(loop, some[2:])
    assert [row.tokens for row in some] == [alone(either, row) for row in some]


def test_where_long_texts_find_no_memory_short_ones_join_again(
    plain: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    short, other = (replace_params(row, GREEDY) for row in of_all_kinds(plain, 2, 3))
    long = Row(short.queries, [7] * 300, GREEDY)
    expected = [written(DecodeLoop(plain, ends=(), slots=1), [row])[0] for row in (short, other)]
    loop = routed(plain)
    with monkeypatch.context() as patch:

        def full(rows: Sequence[Row]) -> list[Row]:
            raise torch.OutOfMemoryError("CUDA out of memory")

        patch.setattr(loop._long, "join", full)
        with pytest.raises(torch.OutOfMemoryError):
            loop.join([short, long, other])
    assert loop.running == []
    assert not any(row.joined or row.tokens for row in (short, long, other))
    write(loop, [short, other])
    assert [short.tokens, other.tokens] == expected


# --- what works -----------------------------------------------------------------------------------


class _Missing(MaskedAttention):
    name = "missing"

    def __init__(self) -> None:
        raise ImportError("no module named triton")


class _Wrong(MaskedAttention):
    name = "wrong"

    def __call__(self, new: torch.Tensor, *args: Any) -> torch.Tensor:
        return new[:, 2]


def _refuses(run: Run) -> Run:
    raise RuntimeError("operation not permitted when stream is capturing")


def _other_tokens(loop_step: list[StaticStep]) -> Callable[[Run], Run]:
    def capture(run: Run) -> Run:
        def replay() -> None:
            run()
            loop_step[0].chosen.add_(1)

        return replay

    return capture


def test_what_cannot_run_is_given_up_for_what_can_in_one_line(
    plain: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[StaticStep] = []
    made = StaticStep.__init__

    def remember(self: StaticStep, *args: Any) -> None:
        made(self, *args)
        steps[:] = [self]

    monkeypatch.setattr(StaticStep, "__init__", remember)
    among = [
        Way(_Missing, lambda: lambda run: run),
        Way(_Wrong, None),
        Way(MaskedAttention, lambda: _refuses),
        Way(MaskedAttention, lambda: _other_tokens(steps)),
        EAGER,
    ]
    with caplog.at_level(logging.INFO, logger=setup.__name__):
        loop = static_loop(plain, ends=(), slots=3, budget=0, among=among)
    assert loop is not None
    (said,) = [each.message for each in caplog.records if each.name == setup.__name__]
    for what in ("3 slots", "sdpa eagerly", "no module named triton", "scores are off"):
        assert what in said
    for what in ("not permitted when stream is capturing", "its graph chooses other tokens"):
        assert what in said
    some = of_all_kinds(plain, 5, 3)
    assert written(loop, some) == written(DecodeLoop(plain, ends=(), slots=5), some)


class _KnowsNoAncestors(KernelAttention):
    """A kernel that reads each slot's own past, whoever its beam goes on from."""

    windows = True

    def __init__(self) -> None:
        self._masked = MaskedAttention()
        self.prepare_cross, self.cross = self._masked.prepare_cross, self._masked.cross

    def prepare(self, *args: Any) -> Any:
        return self._masked.prepare(*args[:4])

    def __call__(self, *args: Any) -> torch.Tensor:
        return self._masked(*args)


def test_a_kernel_that_is_wrong_of_beams_alone_is_given_up(
    plain: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger=setup.__name__):
        loop = static_loop(
            plain, ends=(), slots=3, budget=0, among=[Way(_KnowsNoAncestors, None), EAGER]
        )
    assert loop is not None
    assert loop.way == "sdpa eagerly"
    assert "numbers of its attention are off" in caplog.text


def test_nothing_that_works_leaves_growing_slots(opt: Blip2) -> None:
    opt.open_slots([Way(_Missing, None)], slots=2, budget=0)
    try:
        assert isinstance(opt.session()._loop, DecodeLoop)
    finally:
        opt.generator._static = None


@pytest.mark.parametrize("part", ["static_loop", "most_joining"])
def test_no_error_keeps_a_model_from_being_served(
    opt: Blip2, monkeypatch: pytest.MonkeyPatch, part: str, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise AttributeError("no such part")

    monkeypatch.setattr(generation, part, fail)
    opt.open_slots([RECORDED], slots=2, budget=0)
    try:
        assert opt.static_slots == (0 if part == "static_loop" else 2)
        assert "left out" in caplog.text
    finally:
        opt.generator._static = None


def test_a_model_of_another_kind_has_no_static_slots(plain_opt: Any) -> None:
    """OPT-350m has its norms behind the layers; no BLIP-2 uses it."""
    config = replace_config(plain_opt.config, do_layer_norm_before=False)
    model = OPTForCausalLM(config).eval()
    assert static_loop(model, ends=(), slots=2, budget=0, among=[EAGER]) is None


def replace_config(config: Any, **changes: Any) -> Any:
    return type(config)(**{**config.to_dict(), **changes})


@torch.inference_mode()
def test_a_graph_is_made_when_it_is_first_needed_and_not_too_many(plain_opt: Any) -> None:
    step = step_of(opened(plain_opt, 4))
    made: list[Run] = []
    graphs = Graphs(step, lambda run: (made.append(run), run)[1], rare=2)
    for window in (64, 64, 128, 256):
        graphs(Shape(4, window, Variant()))
    assert len(made) == len(graphs) == 2


@torch.inference_mode()
def test_a_step_that_cannot_be_captured_is_tried_once(
    plain_opt: Any, caplog: pytest.LogCaptureFixture
) -> None:
    graphs = Graphs(step_of(opened(plain_opt, 4)), _refuses)
    for _ in range(3):
        graphs(Shape(4, 64, Variant()))
    assert len(graphs) == 0
    assert len(caplog.messages) == 1


def test_what_records_a_graph_leaves_the_sequences_as_they_are(plain: Any) -> None:
    """A rare graph is made while others are in the middle of their texts."""
    some = of_all_kinds(plain, 8, 5)
    loop = opened(plain, 8)
    loop._run = Graphs(step_of(loop), lambda run: (run(), run(), run)[2])
    expected = [written(DecodeLoop(plain, ends=(), slots=1), [row])[0] for row in some]
    assert written(loop, some) == expected


def test_admissions_that_cannot_be_captured_are_made_without_graphs(
    plain: Any, caplog: pytest.LogCaptureFixture
) -> None:
    some = of_all_kinds(plain, 9, 5)
    expected = written(opened(plain, 9), some)
    for capture, captured in ((_refuses, 0), (lambda run: lambda: None, 0), (lambda run: run, 4)):
        loop = opened(plain, 9)
        graphs = AdmissionGraphs(Admission(step_of(loop)), capture, rare=4)
        loop._admit = graphs
        caplog.clear()
        dice = random.Random(3)
        assert written(loop, some, joining=lambda d=dice: d.randrange(1, 4)) == expected
        assert len(graphs) == captured
        assert len(caplog.messages) == (0 if captured else 1)


def test_more_sequences_than_a_graph_admits_come_at_once(plain: Any) -> None:
    some = [replace_params(row, GREEDY) for row in of_all_kinds(plain, 70, 5)]
    loop = opened(plain, 70, (), RECORDED)
    assert written(loop, some, joining=lambda: 70) == written(opened(plain, 70), some)


def test_as_many_slots_are_reserved_as_there_is_memory_for(
    plain: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    language = setup._language(plain)
    assert language is not None
    each = language.slot_bytes(256)
    asked: list[int] = []
    reserve = type(language).reserve

    def small(self: Any, slots: int, *args: Any) -> None:
        asked.append(slots)
        if slots > 9:
            raise torch.OutOfMemoryError("CUDA out of memory")
        reserve(self, slots, *args)

    monkeypatch.setattr(type(language), "reserve", small)
    for slots, budget, expected in ((32, 0, [32, 16, 8]), (None, 2 * 5 * each, [5]), (None, 0, [])):
        asked.clear()
        loop = static_loop(plain, ends=(), slots=slots, budget=budget, among=[EAGER])
        assert asked == expected
        assert (loop.free if loop else 0) == (expected[-1] if expected else 0)


@pytest.mark.parametrize(
    ("family", "quantization", "slots"), [("opt", "int8", 1), ("opt", "nf4", 4), ("t5", "nf4", 4)]
)
def test_quantized_weights_write_what_they_write_with_generate(
    checkpoints: dict[str, Path], family: str, quantization: Any, slots: int
) -> None:
    """int8 rounds a row by the largest numbers of all: its promise is for a row alone."""
    model = Blip2.load(str(checkpoints[family]), quantization=quantization, dtype="float32")
    some = rows(model, every_penalty(3))
    assert written(static(model, slots, RECORDED), some) == [alone(model, row) for row in some]


@pytest.mark.parametrize("family", ["opt", "t5"])
@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_quantized_steps_wait_for_nothing(
    checkpoints: dict[str, Path], family: str, quantization: Any
) -> None:
    model = Blip2.load(str(checkpoints[family]), quantization=quantization, dtype="float32")
    static_slots = static(model, 4, RECORDED)
    with Card() as card, torch.inference_mode():
        step_of(static_slots)(Shape(4, 64, Variant()))
    assert card.waits == []
    loop = DecodeLoop(model.generator.model.language_model, ends=(), slots=2)
    (row,) = rows(model, [GREEDY])
    loop.join([row])
    with Card() as card:
        loop.step([row])
    of_layers = [each for each in card.waits if "int8" in each]
    assert bool(of_layers) == (quantization == "int8"), "bitsandbytes' own layers wait"


def test_eight_bits_without_graphs_run_in_growing_slots(
    checkpoints: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    """An H100 took 86 to 101 ms for such a step, and 58 to 80 in growing slots."""
    model = Blip2.load(str(checkpoints["opt"]), quantization="int8", dtype="float32")
    model.open_slots([Way(MaskedAttention, lambda: _refuses), EAGER], slots=2, budget=0)
    assert isinstance(model.session()._loop, DecodeLoop)
    (said,) = [each.message for each in caplog.records if each.levelname == "WARNING"]
    assert "not permitted when stream is capturing" in said
    assert "8 bits are slower" in said


@torch.inference_mode()
def test_eight_bits_keep_outliers_in_sixteen_without_waiting() -> None:
    """As bitsandbytes does on a GPU. The last row has more outliers than are kept apart."""
    torch.manual_seed(1)
    exact = torch.nn.Linear(96, 40)
    linear = bitsandbytes.nn.Linear8bitLt(96, 40, has_fp16_weights=False, threshold=6.0)
    linear.load_state_dict(exact.state_dict())
    linear = linear.to("cpu")
    states = torch.randn(4, 96)
    states[0, [3, 50]] = torch.tensor([60.0, -90.0])
    states[1, :20] = 30.0
    states[3] *= 50
    run = EightBits(linear)
    with Card() as card:
        found = torch.cat([run(states[row : row + 1]) for row in range(4)])
    assert card.waits == []
    expected = torch.cat([by_bitsandbytes(linear, states[row : row + 1]) for row in range(4)])
    torch.testing.assert_close(found[:3], expected[:3], atol=1e-4, rtol=1e-4)
    wanted = exact(states)
    assert ((found - wanted).abs().amax(1) <= 0.02 * wanted.abs().amax(1)).all()
    together = run(states[:3]), by_bitsandbytes(linear, states[:3])
    assert all((each - wanted[:3]).abs().max() <= 0.1 for each in together)


def by_bitsandbytes(linear: Any, states: torch.Tensor) -> torch.Tensor:
    """What a GPU runs, on the CPU."""
    product = bitsandbytes.autograd._functions.MatMul8bitLt
    found: torch.Tensor = product.apply(states, linear.weight, None, linear.bias, linear.state)
    return found


def test_fused_layers_share_their_memory_with_what_they_were_made_of() -> None:
    parts = [torch.nn.Linear(6, 4), torch.nn.Linear(6, 4), torch.nn.Linear(6, 2)]
    states = torch.randn(3, 6)
    expected = torch.cat([part(states) for part in parts], -1)
    product, again = fused(parts), fused(parts)
    assert torch.allclose(product(states), expected)
    assert torch.allclose(torch.cat([part(states) for part in parts], -1), expected)
    parts[1].weight.data.zero_()
    assert torch.equal(product(states)[:, 4:8], parts[1].bias.expand(3, 4))
    assert torch.equal(again(states), product(states))


# --- who opens them -------------------------------------------------------------------------------


def test_on_a_gpu_the_first_session_opens_static_slots(
    opt: Blip2, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = opt.generator
    monkeypatch.setattr(generator, "_slots", 5)
    monkeypatch.setattr(generation, "free_memory", lambda device: 0)
    monkeypatch.setattr(setup, "WAYS", (EAGER,))
    monkeypatch.setattr(generator, "_opens_static", True)
    try:
        assert isinstance(opt.session()._loop, RoutedLoop)
        assert opt.static_slots == opt.session()._loop.free == 5
        monkeypatch.setattr(generation, "static_loop", lambda *args, **kwargs: None)
        opt.session()  # the second one opens none
        assert opt.static_slots == 5
    finally:
        generator._static = None


def test_a_cpu_has_growing_slots(opt: Blip2, t5: Blip2) -> None:
    for model in (opt, t5):
        assert isinstance(model.session()._loop, DecodeLoop)
        assert model.static_slots == 0


class Gpu:
    """A model on a device that is not here."""

    class info:
        device = "cuda"

    def __init__(self) -> None:
        self.opened: list[Any] = []

    def open_slots(self, among: Any, *, slots: int | None, budget: int) -> None:
        self.opened.append((tuple(map(str, among)), slots, budget))


def test_models_on_one_gpu_have_equal_parts_of_what_the_weights_leave(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    left = iter([1000, 600])
    monkeypatch.setattr(static_package, "free_memory", lambda device: next(left))
    one, other = Gpu(), Gpu()
    load._open_slots({"a": one, "b": other}, WorkerSettings(decode_slots=7, graphs=False))  # type: ignore[dict-item]
    assert one.opened == [(("sdpa eagerly",), 7, 500)]
    assert other.opened == [(("sdpa eagerly",), 7, 600)]
    load._open_slots({"a": one}, WorkerSettings(compile=True))  # type: ignore[dict-item]
    assert len(one.opened) == 1


@pytest.mark.parametrize(
    ("device", "options"),
    [("cpu", WorkerSettings()), ("cuda", WorkerSettings(graphs=False, decode_slots=7))],
)
def test_no_graphs_are_blamed_where_none_are_captured(
    monkeypatch: pytest.MonkeyPatch, device: str, options: WorkerSettings
) -> None:
    """Whatever ends an engine without graphs, the next one is not to do without them."""
    monkeypatch.setattr(static_package, "free_memory", lambda device: 1000)
    model, opening = Gpu(), ExitStack()
    monkeypatch.setattr(model.info, "device", device)
    opening.callback(pytest.fail, "it was entered")
    load._open_slots({"a": model}, options, opening)  # type: ignore[dict-item]


def test_a_worker_holds_jobs_enough_to_fill_its_slots() -> None:
    assert WorkerSettings().filling(128).threads == 256
    assert WorkerSettings().filling(0).threads == WorkerSettings().threads == 32
    assert WorkerSettings(max_batch_size=200).filling(128).threads == 400
    assert WorkerSettings(concurrency=5).filling(128).threads == 5


# --- the kernel -----------------------------------------------------------------------------------


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The kernel in Triton's interpreter."""
    name = "blipq_worker.blip2.decoding.static.attention.kernel"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.delitem(sys.modules, name, raising=False)
    # What is imported here is the package's attribute, too, which later tests must not find.
    monkeypatch.setattr(static_package, "kernel", None, raising=False)
    yield importlib.import_module(name)
    sys.modules.pop(name, None)


@pytest.mark.parametrize(
    ("dtype", "near"), [(torch.float32, 1e-5), (torch.float16, 2e-3), (torch.bfloat16, 2e-2)]
)
@pytest.mark.parametrize(("heads", "size"), [(3, 80), (2, 64), (2, 16)])
def test_the_kernel_attends_as_torch_does(
    kernel: ModuleType, dtype: torch.dtype, near: float, heads: int, size: int
) -> None:
    torch.manual_seed(1)
    columns, positions = 70, torch.tensor([0, 1, 31, 32, 69])
    cache = torch.randn(2, 6, heads, columns, size).to(dtype)
    cache[:, :, :, 69:] = float("nan")  # nothing behind a sequence is read
    new = torch.randn(5, 3, heads, size).to(dtype)
    ancestry = torch.randint(6, (5, columns), dtype=torch.int32)
    biases = None, torch.randn(heads, columns).to(dtype)
    for bias, slots in itertools.product(biases, (None, ancestry)):
        found = []
        for attention in (MaskedAttention(), KernelAttention()):
            mine = cache.clone()
            if isinstance(attention, MaskedAttention):
                mine.nan_to_num_(0.0)
            prepared = attention.prepare(positions, columns, dtype, bias, slots)
            found.append(attention(new, mine, prepared, size**-0.5).float())
            stored = mine[:, torch.arange(5), :, positions]
            assert torch.equal(stored, new[:, 1:])
        assert (found[0] - found[1]).abs().max() <= near
    lengths = positions.clamp(min=1)
    asked = new[:, 0].contiguous()
    found = []
    for attention in (MaskedAttention(), KernelAttention()):
        prepared = attention.prepare_cross(lengths, 64, dtype)
        part = cache[:, :, :, :64].contiguous()
        found.append(attention.cross(asked, part, prepared.clamp(max=64)).float())
    assert (found[0] - found[1]).abs().max() <= near


def test_the_kernel_writes_the_same_texts(kernel: ModuleType, plain: Any) -> None:
    some = of_all_kinds(plain, 4, 2, longest=4)
    loop = opened(plain, 4, (), Way(KernelAttention, None))
    assert written(loop, some) == written(DecodeLoop(plain, ends=(), slots=4), some)
    searches, expected = anew(some[:2]), anew(some[:2])
    for row in (*searches, *expected):
        row.params = GenerationParams(num_beams=2, max_new_tokens=5, num_return_sequences=2)
    write(loop, [searches[0], *anew(some[2:]), searches[1]])
    write(DecodeLoop(plain, ends=(), slots=4), expected)
    assert [row.texts for row in searches] == [row.texts for row in expected]
