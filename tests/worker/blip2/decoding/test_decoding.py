"""Rows in flight write what each would write alone with transformers' ``generate``."""

import math
import random
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec.structs import replace
from transformers import (
    LogitsProcessorList,
    OPTForCausalLM,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from blipq_worker.blip2 import Blip2
from blipq_worker.blip2.decoding import DecodeLoop, Row, row_seed
from blipq_worker.blip2.decoding.languages import Opt
from blipq_worker.blip2.decoding.opt_step import OptStep
from blipq_worker.blip2.decoding.sampling import PARTS, ScoresError, choose, likeliest
from blipq_worker.inference.requests import GenerationParams
from worker.in_flight import GREEDY, SAMPLED, alone, every_penalty, rows, write


def loop_of(model: Blip2, slots: int) -> DecodeLoop:
    generator = model.generator
    return DecodeLoop(generator.model.language_model, ends=generator._eos, slots=slots)


def written(model: Blip2, some: list[Row], slots: int, **options: Any) -> list[list[int]]:
    """What rows say in a loop of so many slots."""
    fresh = [Row(row.queries, row.ids, row.params, row.seed) for row in some]
    write(loop_of(model, slots), fresh, **options)
    return [row.tokens for row in fresh]


# --- greedy ---------------------------------------------------------------------------------------


def test_every_penalty_gives_the_tokens_of_generate_whatever_the_number_of_slots(
    any_model: Blip2,
) -> None:
    some = rows(any_model, every_penalty(20))
    expected = [alone(any_model, row) for row in some]
    assert len({tuple(tokens) for tokens in expected}) > 12, "the model says the same to everything"
    for slots in (1, 3, 8):
        assert written(any_model, some, slots) == expected


@pytest.mark.parametrize("seed", range(3))
def test_rows_that_come_and_go_at_random_do_not_disturb_each_other(
    either: Blip2, seed: int
) -> None:
    """Rows join, are given up, or are left out of a step; a step of some may be taken again."""
    dice = random.Random(seed)
    some = rows(either, every_penalty(20, seed))
    expected = {row: alone(either, row) for row in some}
    loop, todo, given_up = loop_of(either, 5), list(some), set()
    while todo or loop.running:
        coming: list[Row] = []
        while todo and loop.fits(todo[0], coming) and dice.random() < 0.7:
            coming.append(todo.pop())
        if coming:
            loop.join(coming)
        loop.step([row for row in loop.running if not row.ended and dice.random() < 0.8])
        gone = {row for row in loop.running if not row.ended and dice.random() < 0.05}
        given_up |= gone
        loop.leave([row for row in loop.running if row.ended or row in gone])
    for row, tokens in expected.items():
        assert row.tokens == (tokens[: len(row.tokens)] if row in given_up else tokens)
    assert given_up


@pytest.mark.parametrize(("quantization", "slots"), [("int8", 1), ("nf4", 4)])
def test_quantized_weights_write_what_they_write_with_generate(
    checkpoints: dict[str, Path], quantization: Any, slots: int
) -> None:
    """int8 rounds a row by the largest numbers of all: its promise is for a row alone."""
    for family in ("opt", "t5"):
        model = Blip2.load(str(checkpoints[family]), quantization=quantization, dtype="float32")
        some = rows(model, every_penalty(3))
        assert written(model, some, slots) == [alone(model, row) for row in some]


def test_bfloat16_writes_what_it_writes_alone_with_generate(checkpoints: dict[str, Path]) -> None:
    for family in ("opt", "t5"):
        model = Blip2.load(str(checkpoints[family]), dtype="bfloat16")
        some = rows(model, every_penalty(6))
        assert written(model, some, 1) == [alone(model, row) for row in some]
        assert all(written(model, some, 4))


def test_eager_attention_writes_the_same(checkpoints: dict[str, Path]) -> None:
    for family in ("opt", "t5"):
        model = Blip2.load(str(checkpoints[family]), dtype="float32", attention="eager")
        some = rows(model, every_penalty(8))
        assert written(model, some, 4) == [alone(model, row) for row in some]


@pytest.mark.parametrize("flash", [False, True])
def test_transformers_own_decoder_writes_the_same_with_either_mask(
    opt: Blip2, monkeypatch: pytest.MonkeyPatch, flash: bool
) -> None:
    """It takes the steps where it is compiled."""
    some = rows(opt, every_penalty(8))
    expected = written(opt, some, 4)
    monkeypatch.setattr(OptStep, "suits", lambda model: False)
    if flash:
        monkeypatch.setattr(Opt, "_mask", lambda self, seen: seen)
    assert written(opt, some, 4) == expected


@pytest.mark.parametrize("norm_before", [False, True])
def test_an_opt_with_its_norms_elsewhere_is_left_to_transformers(
    opt: Blip2, norm_before: bool
) -> None:
    """The published OPT with 350 million weights has them behind; no BLIP-2 uses it."""
    torch.manual_seed(2)
    config = deepcopy(opt.generator.model.language_model.config)
    config.do_layer_norm_before = norm_before
    model = OPTForCausalLM(config).eval()
    queries = torch.randn(3, 8, config.hidden_size)
    some = [Row(each, [2, 5, 9][: index + 1], GREEDY) for index, each in enumerate(queries)]
    write(DecodeLoop(model, ends=(), slots=2), some)
    embed = model.get_input_embeddings()
    for row in some:
        embeds = torch.cat([row.queries, embed(torch.tensor(row.ids))])[None]
        (alone,) = model.generate(
            inputs_embeds=embeds, max_new_tokens=12, do_sample=False, eos_token_id=None
        ).tolist()
        assert row.tokens == alone
    assert OptStep.suits(model) == norm_before


def test_a_short_row_is_not_changed_by_the_columns_of_a_long_one(opt: Blip2) -> None:
    """The long one makes room for all its tokens, at which no step looks as a whole at first."""
    long, *short = rows(opt, [replace(GREEDY, max_new_tokens=90, min_new_tokens=90), *[GREEDY] * 4])
    expected = [alone(opt, row) for row in (long, *short)]
    assert written(opt, [long, *short], 3) == expected


def test_a_row_may_fill_the_positions_to_the_last(opt: Blip2) -> None:
    params = replace(GREEDY, max_new_tokens=40, min_new_tokens=40)
    (row,) = rows(opt, [params])
    row.ids = opt.generator.ids("b" * (128 - 32 - 40 - 1))
    assert written(opt, [row, *rows(opt, every_penalty(3))], 4)[0] == alone(opt, row)


# --- sampling -------------------------------------------------------------------------------------


def test_a_sampled_text_depends_on_its_seed_and_not_on_its_neighbours(any_model: Blip2) -> None:
    dice = random.Random(2)
    params = [
        replace(
            SAMPLED,
            temperature=dice.uniform(0.5, 2.0),
            top_p=dice.choice([0.8, 0.95, 1.0]),
            top_k=dice.choice([0, 5, 50, 1000]),
            repetition_penalty=dice.choice([1.0, 1.2]),
        )
        for _ in range(16)
    ]
    some = rows(any_model, params)
    expected = written(any_model, some, 16)
    assert len({tuple(tokens) for tokens in expected}) > 10
    assert written(any_model, some, 5, joining=lambda: dice.randrange(4)) == expected
    assert written(any_model, list(reversed(some)), 7) == list(reversed(expected))
    assert written(any_model, some[:3], 1) == expected[:3]


def test_seeds_and_alternatives_give_other_texts(opt: Blip2) -> None:
    row = rows(opt, [replace(SAMPLED, temperature=3.0, top_p=1.0, top_k=0)])[0]
    seeds = [row_seed(seed, alternative) for seed in range(5) for alternative in range(5)]
    some = [Row(row.queries, row.ids, row.params, seed) for seed in seeds]
    assert len({tuple(tokens) for tokens in written(opt, some, 8)}) == 25
    assert row_seed(1, 2) != row_seed(2, 1) != row_seed(12)


def chosen(scores: torch.Tensor, some: list[Row]) -> list[int]:
    return [token for token, _ in choose(scores, some, ends=[], start=[])]


def warped(scores: torch.Tensor, params: GenerationParams) -> torch.Tensor:
    """Probabilities by transformers' own warpers."""
    processors = LogitsProcessorList([TemperatureLogitsWarper(params.temperature)])
    if params.top_k:
        processors.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1.0:
        processors.append(TopPLogitsWarper(params.top_p))
    probabilities: torch.Tensor = processors(torch.empty((1, 0)), scores[None])[0].softmax(-1)
    return probabilities


@pytest.mark.parametrize("top_k", [0, 3, 30, 1000])
@pytest.mark.parametrize("top_p", [0.3, 0.9, 1.0])
@pytest.mark.parametrize("vocabulary", [60, 1200])
def test_draws_follow_transformers_probabilities(top_k: int, top_p: float, vocabulary: int) -> None:
    """Over seeds, and over the steps of one seed."""
    scores = torch.randn(vocabulary, generator=torch.Generator().manual_seed(vocabulary)) * 2
    params = replace(SAMPLED, top_k=top_k, top_p=top_p)
    expected = warped(scores, params)
    nothing = torch.empty((0, 1))
    number = 1500
    seeds = [Row(nothing, [], params, row_seed(seed)) for seed in range(number)]
    steps = [Row(nothing, [], params, 1, [0] * step) for step in range(number)]
    for some in (seeds, steps):
        drawn = torch.tensor(chosen(scores.expand(number, -1), some))
        found = drawn.bincount(minlength=vocabulary) / number
        assert not found[expected == 0].any(), "a token was drawn that is cut off"
        likely = expected * number > 5
        deviation = (found - expected)[likely].square() / expected[likely] * number
        assert deviation.mean() < 1.6  # a chi-square per degree of freedom, of 3 to 100 of them


def test_a_nucleus_wider_than_the_window_is_drawn_from_as_a_whole() -> None:
    """A flat distribution: the tokens looked at first hold a quarter of it."""
    scores = torch.randn(2000, generator=torch.Generator().manual_seed(1)) * 0.01
    flat = [Row(torch.empty((0, 1)), [], replace(SAMPLED, top_k=0), seed) for seed in range(500)]
    peaked = [Row(torch.empty((0, 1)), [], replace(SAMPLED, top_k=5), seed) for seed in range(500)]
    both = chosen(scores.expand(1000, -1), [*flat, *peaked])
    assert both[:500] == chosen(scores.expand(500, -1), flat)
    assert both[500:] == chosen(scores.expand(500, -1), peaked)
    assert len(set(both[:500])) > 300
    assert len(set(both[500:])) == 5


@pytest.mark.parametrize("vocabulary", [PARTS, 7 * PARTS, 7 * PARTS + 1, 50_272])
def test_the_likeliest_token_is_the_first_of_the_largest_scores(vocabulary: int) -> None:
    scores = torch.randn(64, vocabulary, generator=torch.Generator().manual_seed(vocabulary))
    scores[:16] = scores[:16].round()  # many are equal
    scores[16, :] = 1.0
    scores[17, :-1] = -math.inf
    for row in range(18, 34):
        scores[row, [row % vocabulary, vocabulary - 1 - row % vocabulary]] = 9.0
    expected = [row.tolist().index(max(row.tolist())) for row in scores]
    assert likeliest(scores).tolist() == expected


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_one_score_that_is_no_number_is_an_error_wherever_it_stands(bad: float) -> None:
    some = [Row(torch.zeros(1), torch.zeros(1), GREEDY) for _ in range(3)]
    for at in (0, 40, 63):
        scores = torch.randn(3, 64)
        scores[1, at] = bad
        with pytest.raises(ScoresError):
            choose(scores, some, ends=[2], start=[])
    hopeless = torch.full((1, 64), -math.inf)
    with pytest.raises(ScoresError):
        choose(hopeless, some[:1], ends=[2], start=[])


# --- failing alone --------------------------------------------------------------------------------


def poisoned(row: Row) -> Row:
    """The row, of an image whose features are not numbers."""
    return Row(torch.full_like(row.queries, float("nan")), row.ids, row.params)


def test_a_row_without_finite_scores_cannot_join_and_changes_nothing(either: Blip2) -> None:
    some = rows(either, every_penalty(6))
    loop = loop_of(either, 8)
    loop.join(some[:3])
    tokens = [list(row.tokens) for row in some]
    with pytest.raises(ScoresError):
        loop.join([some[3], poisoned(some[4])])
    assert loop.running == some[:3]
    assert [list(row.tokens) for row in some] == tokens
    write(loop, some[3:])
    assert [row.tokens for row in some] == [alone(either, row) for row in some]


def test_a_step_that_raised_can_be_taken_again_by_fewer(either: Blip2) -> None:
    """A row that goes bad under way leaves no trace in the slot that it leaves."""
    params = replace(GREEDY, max_new_tokens=8, min_new_tokens=8)
    first, bad, third, next_one = rows(either, [params] * 4)
    loop = loop_of(either, 3)
    loop.join([first, bad, third])
    loop.step([first, bad, third])
    for slots in loop._language.slots:
        for buffer in slots.buffers:
            with torch.inference_mode():
                buffer[:, 1] = float("nan")
    with pytest.raises(ScoresError):
        loop.step([first, bad, third])
    with pytest.raises(ScoresError):
        loop.step([bad])
    assert len(first.tokens) == len(bad.tokens) == 2
    loop.step([third])
    loop.leave([bad])
    write(loop, [next_one])
    for row in (first, third, next_one):
        assert row.tokens == alone(either, row)


# --- memory ---------------------------------------------------------------------------------------


def test_keys_and_values_grow_with_the_rows_and_are_given_back(either: Blip2) -> None:
    loop = loop_of(either, 32)
    some = rows(either, [replace(GREEDY, min_new_tokens=12)] * 32)
    assert loop.bytes == 0
    loop.join(some[:4])
    few = loop.bytes
    loop.join(some[4:])
    assert few < loop.bytes <= 4 * few
    loop.leave(some)
    assert loop.bytes == 0


def test_long_rows_run_with_fewer_beside_them(opt: Blip2) -> None:
    loop = loop_of(opt, 4)
    long = Row(torch.zeros(32, 64), [2] * 400, GREEDY)
    short = Row(torch.zeros(32, 64), [2], GREEDY)
    assert loop.fits(long)
    assert loop.fits(long, [short])
    assert not loop.fits(long, [short, short])
    assert loop.fits(short, [short] * 3)
    assert not loop.fits(short, [short] * 4)


def test_room_is_counted_in_the_memory_that_rows_will_take(either: Blip2) -> None:
    """Long searches counted as one slot each: more were let in than could run together."""
    loop = loop_of(either, 8)
    short = Row(torch.zeros(32, 64), [2], GREEDY)
    search = Row(torch.zeros(32, 64), [2], replace(GREEDY, num_beams=5, max_new_tokens=100))
    widest = replace(GREEDY, num_beams=16, max_new_tokens=500)
    assert [loop.size(row) for row in (short, search)] == [1, 3]
    assert loop.size(Row(torch.zeros(32, 64), [2], widest)) == 8, "it may run alone"
    assert (loop.free, loop.room) == (8, 8)
    loop.join([short, search])
    assert (loop.free, loop.room) == (6, 5)
    loop.leave([search])
    assert (loop.free, loop.room) == (7, 7)
