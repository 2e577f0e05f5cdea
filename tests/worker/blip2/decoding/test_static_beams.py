"""Beams in static slots write what ``generate(num_beams=k)`` writes, whoever is in the other slots.

As in growing slots: in fp32 token by token, with scores within 1e-5, but for the order of equals.
"""

import random
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from msgspec.structs import replace

from blipq_worker.blip2 import Blip2
from blipq_worker.blip2.decoding import DecodeLoop, Row, row_seed
from blipq_worker.blip2.decoding.sampling import ScoresError
from blipq_worker.blip2.decoding.static import StaticLoop, Way, setup, static_loop
from blipq_worker.blip2.decoding.static.attention.methods import MaskedAttention
from blipq_worker.blip2.decoding.static.graphs import Graphs
from blipq_worker.blip2.decoding.static.state import SlotState
from blipq_worker.blip2.decoding.static.step import Shape
from blipq_worker.blip2.generation.routing import RoutedLoop
from worker.blip2.decoding.test_beams import (
    DEFAULT,
    by_generate,
    model_of,
    require_same,
    run,
    small_llama,
    small_opt,
    small_t5,
    some_rows,
)
from worker.blip2.decoding.test_sampled_beams import sampled_rows
from worker.in_flight import GREEDY, every_penalty, rows

EAGER = Way(MaskedAttention, None)
#: Stands in for graphs: what it records is run again as it is.
RECORDED = Way(MaskedAttention, lambda: lambda run: run)


def opened(model: Any, slots: int, ends: Sequence[int] = (5,), way: Way = EAGER) -> StaticLoop:
    loop = static_loop(model, ends=ends, slots=slots, budget=0, among=[way])
    assert loop is not None
    return loop


def anew(some: Sequence[Row]) -> list[Row]:
    return [Row(row.queries, row.ids, row.params, row.seed) for row in some]


def launched(loop: StaticLoop) -> list[Shape]:
    """The shapes of the steps from now on."""
    shapes: list[Shape] = []
    take = loop._run
    loop._run = lambda shape: (shapes.append(shape), take(shape))[1]
    return shapes


# --- the texts ------------------------------------------------------------------------------------


@pytest.mark.parametrize("stopping", [None, True, "never"])
@pytest.mark.parametrize("make", [small_opt, small_llama, small_t5])
def test_beams_of_all_parameters_write_what_generate_writes(make: Any, stopping: Any) -> None:
    """Together and beside greedy texts, as they come, in slots that others were in before."""
    cut_short = 0
    for ends in ((5,), (5, 6, 7), ()):
        model = model_of(make, ends, stopping)
        some = some_rows(30, seed=len(ends))
        expected = {row: by_generate(model, row, ends) for row in some}
        loop = opened(model, 23, ends, EAGER if len(ends) == 1 else RECORDED)
        shapes = launched(loop)
        run(loop, some, random.Random(4))
        assert {shape.variant.beams for shape in shapes} >= {5, 16}
        assert len({shape.slots for shape in shapes}) > 1
        for row, what in expected.items():
            require_same(row, what)
            limit = row.params.max_new_tokens
            cut_short += row.has_beams and any(len(text) < limit for text in what[0])
    assert cut_short > 10, "hardly any search ends before its limit"


@pytest.mark.parametrize("make", [small_opt, small_t5])
def test_sampled_beams_write_what_they_write_in_growing_slots(make: Any) -> None:
    """Whoever is beside them: searches that draw or not, and texts without beams of both kinds."""
    for ends in ((5,), (5, 6, 7)):
        model = model_of(make, ends)
        some = sampled_rows(40, seed=len(ends) + 40)
        for row in some[::5]:
            row.params = replace(row.params, num_beams=1, num_return_sequences=1)
        expected = anew(some)
        for row in expected:
            run(DecodeLoop(model, ends=ends, slots=1), [row], random.Random(1))
        run(opened(model, 31, ends, RECORDED), some, random.Random(4))
        for row, alone in zip(some, expected, strict=True):
            assert row.alternatives == alone.alternatives, row.params
            assert row.scores == pytest.approx(alone.scores, rel=1e-5)


def test_texts_of_trained_models_are_those_of_generate(demo: Blip2, twin: Blip2) -> None:
    """By the default parameters of a caption, with every text that there is, and no tie."""
    for model in (demo, twin):
        generator = model.generator
        language_model = generator.model.language_model
        params = [replace(DEFAULT, num_return_sequences=5, length_penalty=each) for each in (1, -1)]
        some = rows(model, [*params, *every_penalty(4), *params])
        expected = [by_generate(language_model, row, generator._eos) for row in some]
        run(opened(language_model, 12, generator._eos), some, random.Random(3))
        for row, (texts, scores) in zip(some, expected, strict=True):
            assert row.alternatives == texts
            assert row.scores == pytest.approx(scores, rel=1e-5)


@pytest.mark.parametrize("make", [small_opt, small_t5])
def test_sixteen_beams_may_fill_their_slots_to_the_last_column(make: Any) -> None:
    model = model_of(make, (5,))
    (long,), short = some_rows(1, seed=1), some_rows(6, seed=2)
    new = 128 if make is small_t5 else 256 - long.prompt_length + 1
    long.params = replace(
        DEFAULT, num_beams=16, max_new_tokens=new, min_new_tokens=new, no_repeat_ngram_size=32
    )
    expected = {row: by_generate(model, row, (5,)) for row in (long, *short)}
    loop = opened(model, 25)
    assert loop.suits(long)
    run(loop, [long, *short], random.Random(5))
    for row, what in expected.items():
        require_same(row, what)


@pytest.mark.parametrize("make", [small_opt, small_t5])
def test_who_is_given_up_changes_nobody_who_has_the_slots_next(make: Any) -> None:
    """What a step found for one never reaches the next, though it is read a step late."""
    model = model_of(make, (5,))
    some = some_rows(40, seed=11)
    expected = {row: by_generate(model, row, (5,)) for row in some}
    gone = run(opened(model, 14), some, random.Random(2), given_up=0.08)
    assert len(gone) > 5
    for row in expected.keys() - gone:
        require_same(row, expected[row])


# --- slots ----------------------------------------------------------------------------------------


def test_a_search_takes_a_slot_for_each_beam_and_gives_all_of_them_back() -> None:
    model = model_of(small_opt, ())
    some = some_rows(4, seed=4)
    for row, beams in zip(some, (5, 1, 3, 2), strict=True):
        row.params = replace(DEFAULT, num_beams=beams, max_new_tokens=9)
    loop = opened(model, 10, ())
    assert [loop.size(row) for row in some] == [5, 1, 3, 2]
    assert loop.fits(some[3], some[:2])
    assert not loop.fits(some[3], some[:3]), "eleven beams, where there are ten slots"
    loop.join(some[:3])
    assert loop.free == 1
    assert not loop.fits(some[3])
    loop.leave(some[:1])
    assert loop.free == 6
    loop.join(some[3:])
    run(loop, [], random.Random(1))
    assert loop.free == 10
    for row in some[1:]:
        require_same(row, by_generate(model, row, ()))


@pytest.mark.parametrize("make", [small_opt, small_t5])
def test_a_join_that_raises_leaves_nobody_alive_in_free_slots(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The greedy text is in its slot, and the search has its group, when memory runs out."""
    model = model_of(make, ())
    some = some_rows(3, seed=4)
    for row, beams in zip(some, (1, 3, 2), strict=True):
        row.params = replace(DEFAULT, num_beams=beams, max_new_tokens=9)
    expected = {row: by_generate(model, row, ()) for row in some}
    loop = opened(model, 8, ())
    loop.join(some[2:])
    with monkeypatch.context() as patch:

        def full(*args: Any) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory")

        patch.setattr(SlotState, "place_beams", full)
        with pytest.raises(torch.OutOfMemoryError):
            loop.join(some[:2])
    state, groups = loop._step.state, loop._step.groups
    assert state.live.tolist() == [True, True, *[False] * 6]
    assert state.positions[2:].tolist() == groups.number[2:].tolist() == [0] * 6
    run(loop, some[:2], random.Random(1))
    for row, what in expected.items():
        require_same(row, what)


def test_a_step_covers_the_groups_in_use_and_their_slots() -> None:
    """Groups have numbers of their own: who stays may have a low slot and a high number."""
    model = model_of(small_opt, ())
    some = some_rows(7, seed=4)
    for row in some:
        row.params = replace(DEFAULT, num_beams=2, max_new_tokens=9, min_new_tokens=9)
    expected = by_generate(model, some[6], ())
    loop = opened(model, 16, ())
    single = Row(some[0].queries, some[0].ids, replace(GREEDY, max_new_tokens=9))
    loop.join([single, single_like(single)])
    loop.join(some[:6])
    loop.leave([row for row in loop.running if not row.has_beams])
    loop.join(some[6:])
    loop.leave(some[:6])
    shapes = launched(loop)
    run(loop, [], random.Random(1))
    assert {shape.slots for shape in shapes} == {16}
    require_same(some[6], expected)


def single_like(row: Row) -> Row:
    return Row(row.queries, row.ids, row.params, row.seed)


def test_more_beams_than_slots_search_in_growing_ones() -> None:
    model = model_of(small_opt, (5,))
    some = some_rows(6, seed=5)
    for row, beams in zip(some, (9, 2, 9, 3, 1, 4), strict=True):
        row.params = replace(DEFAULT, num_beams=beams)
    expected = {row: by_generate(model, row, (5,)) for row in some}
    loop = RoutedLoop(opened(model, 8), DecodeLoop(model, ends=(5,), slots=4))
    assert [loop.size(row) for row in some] == [0, 2, 0, 3, 1, 4], "static slots"
    run(loop, some, random.Random(5))
    for row, what in expected.items():
        require_same(row, what)


@pytest.mark.parametrize("make", [small_opt, small_t5])
def test_a_prompt_is_read_once_for_all_of_its_beams(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(make, (5,))
    (row,) = some_rows(1, seed=4)
    row.params = DEFAULT
    loop = opened(model, 8)
    language = loop._step.language
    prefill, read = language.prefill, []
    monkeypatch.setattr(
        language, "prefill", lambda *given: (read.append(len(given[0])), prefill(*given))[1]
    )
    run(loop, [row], random.Random(1))
    assert read == [1]


def test_no_keys_or_values_move_when_beams_go_on_from_others() -> None:
    """A step writes one column of each slot, and the table of ancestors says the rest."""
    model = model_of(small_opt, ())
    (row,) = some_rows(1, seed=4)
    row.params = replace(DEFAULT, num_beams=4, max_new_tokens=12, min_new_tokens=12)
    loop = opened(model, 4, ())
    loop.join([row])
    own, groups = loop._step.language._own, loop._step.groups
    before, shared = own._all.clone(), 0
    for written in range(1, 8):
        loop.step([row])
        changed = (own._all != before).any(-1).any(3).any(0).any(0).nonzero().tolist()
        column = row.prompt_length + written - 1
        assert changed == [[slot, column] for slot in range(4)]
        before = own._all.clone()
        seen = groups.ancestry[:, : column + 1]
        assert (seen[:, : row.prompt_length] == 0).all(), "the prompt is in the first slot"
        shared += int((seen[:, column] != torch.arange(4)).any())
    assert shared > 2, "no beam ever goes on from another one"


# --- what fails -----------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [small_opt, small_t5])
def test_a_search_that_breaks_fails_alone_and_leaves_no_trace(make: Any) -> None:
    model = model_of(make, (5,))
    first, bad, third, next_one = some_rows(4, seed=3)
    for row in (first, bad, third, next_one):
        row.params = replace(DEFAULT, min_new_tokens=8)
    expected = {row: by_generate(model, row, (5,)) for row in (first, third, next_one)}
    bad.queries = bad.queries * float("nan")
    loop = opened(model, 15)
    loop.join([first, bad, third])
    loop.step([first, bad, third])
    with pytest.raises(ScoresError):
        loop.step([first, bad, third])
    with pytest.raises(ScoresError):
        loop.step([bad])
    loop.step([third])
    loop.leave([bad])
    assert not bad.ended
    run(loop, [next_one], random.Random(1))
    for row, what in expected.items():
        require_same(row, what)


def test_steps_with_beams_that_cannot_be_captured_leave_the_others_their_graphs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = model_of(small_opt, (5,))
    some = some_rows(12, seed=9)
    expected = {row: by_generate(model, row, (5,)) for row in some}
    checked = Graphs._checked

    def refused(self: Graphs, shape: Shape) -> Any:
        if shape.variant.beams:
            raise RuntimeError("operation not permitted when stream is capturing")
        return checked(self, shape)

    monkeypatch.setattr(Graphs, "_checked", refused)
    loop = opened(model, 16, (5,), RECORDED)
    assert loop.way == "sdpa in graphs"
    run(loop, some, random.Random(2))
    assert {shape.variant.beams for shape, graph in loop._run._replays.items() if graph} == {0}
    for row, what in expected.items():
        require_same(row, what)


def test_what_records_a_graph_leaves_searches_as_they_are() -> None:
    """A rare graph is made while others are in the middle of their texts."""
    model = model_of(small_t5, (5,))
    some = [*some_rows(10, seed=6), *sampled_rows(4, seed=6)]
    for row in some[10:]:
        row.seed = row_seed(7)
    expected = anew(some)
    for row in expected:
        run(DecodeLoop(model, ends=(5,), slots=1), [row], random.Random(1))
    loop = opened(model, 40, (5,), Way(MaskedAttention, lambda: _twice))
    run(loop, some, random.Random(2))
    for row, alone in zip(some, expected, strict=True):
        assert row.alternatives == alone.alternatives


def _twice(run: Any) -> Any:
    """As a graph is recorded: after two runs that no one asked for."""
    run()
    run()
    return run


class Unbiased(MaskedAttention):
    """A kernel that loses the bias of distances, of beams or of all others."""

    def __init__(self, of_beams: bool) -> None:
        self.of_beams = of_beams

    def prepare(self, positions: Any, window: Any, dtype: Any, bias: Any, ancestry: Any) -> Any:
        lost = (ancestry is not None) == self.of_beams
        return super().prepare(positions, window, dtype, None if lost else bias, ancestry)


@pytest.mark.parametrize("of_beams", [False, True])
def test_a_start_finds_out_a_kernel_that_loses_the_bias(of_beams: bool) -> None:
    for make, biased in ((small_opt, False), (small_t5, True)):
        step = opened(model_of(make, (5,)), 4)._step
        step.attention = Unbiased(of_beams)
        with pytest.raises(RuntimeError, match="attention are off") if biased else nullcontext():
            setup._require_same_attention(step)
