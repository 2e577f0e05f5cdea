"""Beams in flight write what ``generate(num_beams=k)`` writes, whoever comes and goes beside them.

In fp32 the texts are the same token by token, and their scores within 1e-5 of them. Equal scores
are the one excuse: where they are nearer to each other than that, additions in another order may
put another text first.
"""

import itertools
import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from benchmarks.by_generate import quiet_about_penalties
from msgspec.structs import replace

from blipq_worker.blip2 import Blip2
from blipq_worker.blip2.decoding import DecodeLoop, Row
from blipq_worker.blip2.decoding.sampling import ScoresError
from blipq_worker.inference.requests import GenerationParams
from worker.in_flight import every_penalty, rows
from worker.tiny_models import PLAIN_WIDTH, plain_llama, plain_opt, plain_t5

VOCABULARY = 300
#: Seen as equal, by the larger score.
TIE = 1e-6
DEFAULT = GenerationParams()


def small_opt() -> Any:
    return plain_opt(VOCABULARY, positions=700, spread=0.25)


def small_llama() -> Any:
    return plain_llama(VOCABULARY, positions=700, spread=0.25, sharing=2)


def small_t5() -> Any:
    return plain_t5(VOCABULARY, spread=1.0)


def model_of(make: Any, ends: Sequence[int], stopping: Any = None, seed: int = 3) -> Any:
    """Random weights under which texts end now and then."""
    torch.manual_seed(seed)
    model = make().eval().requires_grad_(False)
    head = torch.randn(VOCABULARY, PLAIN_WIDTH) * (0.6 if make is small_t5 else 0.4)
    head[list(ends)] *= 1.6
    model.lm_head.weight = torch.nn.Parameter(head, requires_grad=False)
    model.generation_config.early_stopping = stopping
    return model


def of_all_kinds(dice: random.Random, longest: int = 24) -> GenerationParams:
    beams = dice.choice([1, 2, 3, 4, 5, 5, 6, 9])
    limit = dice.randint(1, longest)
    return GenerationParams(
        num_beams=beams,
        max_new_tokens=limit,
        min_new_tokens=dice.choice([0, 0, dice.randint(0, limit)]),
        repetition_penalty=dice.choice([1.0, 1.0, 0.8, 1.3]),
        no_repeat_ngram_size=dice.choice([0, 0, 1, 2, 3, 5]),
        length_penalty=dice.choice([-1.0, 0.0, 0.5, 1.0, 1.0, 2.0, 5.0]),
        num_return_sequences=dice.randint(1, beams),
    )


def some_rows(number: int, seed: int, **options: Any) -> list[Row]:
    dice, numbers = random.Random(seed), torch.Generator().manual_seed(seed)
    return [
        Row(
            torch.randn(8, PLAIN_WIDTH, generator=numbers) * 0.7,
            [dice.randrange(8, VOCABULARY) for _ in range(dice.randint(1, 9))],
            of_all_kinds(dice, **options),
        )
        for _ in range(number)
    ]


@torch.inference_mode()
def by_generate(model: Any, row: Row, ends: Sequence[int]) -> tuple[list[list[int]], list[float]]:
    """The texts of a row up to their end tokens, and their scores; of a text alone none."""
    params, embed = row.params, model.get_input_embeddings()
    embeds = torch.cat([row.queries, embed(torch.tensor(row.ids))])[None]
    beams = params.num_beams
    with quiet_about_penalties():
        said = model.generate(
            inputs_embeds=embeds,
            attention_mask=torch.ones(embeds.shape[:2], dtype=torch.long),
            eos_token_id=list(ends) or None,
            pad_token_id=1,
            do_sample=False,
            num_beams=beams,
            max_new_tokens=params.max_new_tokens,
            min_new_tokens=params.min_new_tokens,
            repetition_penalty=params.repetition_penalty,
            no_repeat_ngram_size=params.no_repeat_ngram_size,
            num_return_sequences=params.num_return_sequences if beams > 1 else 1,
            return_dict_in_generate=True,
            output_scores=True,
            **({"length_penalty": params.length_penalty} if beams > 1 else {}),
        )
    skipped = 1 if model.config.is_encoder_decoder else 0
    texts = [_up_to_end(text[skipped:], ends) for text in said.sequences.tolist()]
    return texts, said.sequences_scores.tolist() if beams > 1 else []


def _up_to_end(text: list[int], ends: Sequence[int]) -> list[int]:
    at = next((index for index, token in enumerate(text) if token in ends), len(text))
    return text[: at + 1]


def run(loop: Any, todo: Sequence[Row], dice: random.Random, given_up: float = 0.0) -> set[Row]:
    """Runs rows that come at random, are left out of steps, and are given up; the last of them."""
    todo, gone = list(todo), set()
    while todo or loop.running:
        coming: list[Row] = []
        while todo and loop.fits(todo[0], coming) and dice.random() < 0.6:
            coming.append(todo.pop(0))
        loop.join(coming)
        loop.step([row for row in loop.running if not row.ended and dice.random() < 0.85])
        gone |= {row for row in loop.running if not row.ended and dice.random() < given_up}
        loop.leave([row for row in loop.running if row.ended or row in gone])
    return gone


def is_tie(scores: Sequence[float], expected: Sequence[float]) -> bool:
    """Whether only the order of equal scores can be what differs."""
    near = [abs(above - below) <= TIE * abs(below) for above, below in itertools.pairwise(expected)]
    return any(near) and scores == pytest.approx(expected, rel=TIE)


def require_same(row: Row, expected: tuple[list[list[int]], list[float]]) -> None:
    texts, scores = expected
    assert row.alternatives == texts or is_tie(row.scores, scores), row.params
    if scores:
        assert row.scores == pytest.approx(scores, rel=1e-5), row.params


@pytest.mark.parametrize("stopping", [None, True, "never"])
@pytest.mark.parametrize("make", [small_opt, small_llama, small_t5])
def test_beams_of_all_parameters_write_what_generate_writes(make: Any, stopping: Any) -> None:
    """Together and beside greedy texts, as they come; with one end token, with three and none."""
    cut_short = 0
    for ends in ((5,), (5, 6, 7), ()):
        model = model_of(make, ends, stopping)
        some = some_rows(30, seed=len(ends))
        expected = {row: by_generate(model, row, ends) for row in some}
        run(DecodeLoop(model, ends=ends, slots=9), some, random.Random(4))
        for row, what in expected.items():
            require_same(row, what)
            limit = row.params.max_new_tokens
            cut_short += row.has_beams and any(len(text) < limit for text in what[0])
    assert cut_short > 10, "hardly any search ends before its limit"


def test_in_float64_texts_and_scores_are_those_of_generate_bit_for_bit() -> None:
    """Of rows that join and step one by one: no sum has another order then."""
    for make in (small_opt, small_t5):
        model = model_of(make, (5,)).double()
        some = [replace_queries(row) for row in some_rows(12, seed=8)]
        for row in some:
            expected = by_generate(model, row, (5,))
            loop = DecodeLoop(model, ends=(5,), slots=1)
            run(loop, [row], random.Random(1))
            assert row.alternatives == expected[0]
            assert row.scores == pytest.approx(expected[1], rel=1e-12)


def replace_queries(row: Row) -> Row:
    return Row(row.queries.double(), row.ids, row.params)


@pytest.mark.parametrize("make", [small_opt, small_t5])
def test_who_is_given_up_changes_nobody(make: Any) -> None:
    model = model_of(make, (5,))
    some = some_rows(30, seed=11)
    expected = {row: by_generate(model, row, (5,)) for row in some}
    gone = run(DecodeLoop(model, ends=(5,), slots=7), some, random.Random(2), given_up=0.05)
    assert len(gone) > 3
    for row in expected.keys() - gone:
        require_same(row, expected[row])


def test_texts_of_trained_models_are_those_of_generate(demo: Blip2, twin: Blip2) -> None:
    """By the default parameters of a caption, with every text that there is, and no tie."""
    for model in (demo, twin):
        generator = model.generator
        params = [replace(DEFAULT, num_return_sequences=5, length_penalty=each) for each in (1, -1)]
        some = rows(model, [*params, *every_penalty(4), *params])
        expected = [by_generate(generator.model.language_model, r, generator._eos) for r in some]
        loop = DecodeLoop(generator.model.language_model, ends=generator._eos)
        run(loop, some, random.Random(3))
        for row, (texts, scores) in zip(some, expected, strict=True):
            assert row.alternatives == texts
            assert row.scores == pytest.approx(scores, rel=1e-5)


# --- the widest that the contract has ------------------------------------------------------------


@pytest.mark.parametrize("make", [small_opt, small_t5])
def test_sixteen_beams_may_write_to_the_last_position(make: Any) -> None:
    params = GenerationParams(num_beams=16, max_new_tokens=512, min_new_tokens=512)
    model = model_of(make, (5,))
    (long,), short = some_rows(1, seed=1), some_rows(6, seed=2)
    long.params = replace(params, max_new_tokens=120, min_new_tokens=120, no_repeat_ngram_size=32)
    expected = {row: by_generate(model, row, (5,)) for row in (long, *short)}
    loop = DecodeLoop(model, ends=(5,), slots=4)
    run(loop, [long, *short], random.Random(5))
    for row, what in expected.items():
        require_same(row, what)


def test_a_search_that_needs_more_memory_than_there_is_for_slots_runs_alone() -> None:
    model = model_of(small_opt, ())
    wide, *others = some_rows(3, seed=4)
    wide.params = GenerationParams(num_beams=16, max_new_tokens=512)
    loop = DecodeLoop(model, ends=(), slots=8)
    assert loop.fits(wide)
    loop.join([wide])
    assert not any(loop.fits(row) for row in others)


@pytest.mark.parametrize("make", [small_opt, small_t5])
def test_no_search_takes_more_columns_than_its_beams_can_need(make: Any) -> None:
    """Of those that share a step with wider ones, too: what is reserved for each is its longest."""
    model = model_of(make, ())
    some = some_rows(12, seed=31)
    loop = DecodeLoop(model, ends=(), slots=12)
    loop.join([row for row in some if row.has_beams])
    groups, most = loop._groups, 0
    while loop.running:
        loop.step([row for row in loop.running if not row.ended])
        loop.leave([row for row in loop.running if row.ended])
        taken = groups._seen.any(1) if groups.running else ()
        for group, columns in zip(groups.running, taken, strict=True):
            used = int(columns.nonzero()[-1]) + 1
            assert used <= loop._language.own_columns(group.row)
            assert int(columns.sum()) <= group.first + group.beams * (group.written - 1)
            most = max(most, group.first + group.beams * (group.written - 1) - used)
    assert most > 50, "hardly any column is taken again"


def test_a_step_has_a_largest_number_of_beams() -> None:
    model = model_of(small_opt, ())
    some = some_rows(6, seed=4)
    for row in some:
        row.params = replace(DEFAULT, num_beams=9)
    some[-1].params = replace(DEFAULT, num_beams=1)
    loop = DecodeLoop(model, ends=(), slots=4)
    assert loop.fits(some[0])
    loop.join(some[:2])
    assert not loop.fits(some[2]), "27 beams, where four slots have 20"
    assert loop.fits(some[-1]), "one without beams is no beam"


def test_only_beams_that_live_are_computed() -> None:
    """A group takes as many rows of a step as it has beams, whatever its neighbours have."""
    model = model_of(small_opt, ())
    some = some_rows(3, seed=4)
    for row, beams in zip(some, (1, 2, 7), strict=True):
        row.params = replace(DEFAULT, num_beams=beams, max_new_tokens=9)
    loop = DecodeLoop(model, ends=(), slots=8)
    loop.join(some)
    widths: list[int] = []
    head = model.lm_head.forward
    loop._language._own._head = lambda states: (widths.append(len(states)), head(states))[1]
    loop.step(some)
    assert widths == [1 + 2 + 7]


def test_a_prompt_is_read_once_for_all_of_its_beams(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(small_opt, ())
    (row,) = some_rows(1, seed=4)
    row.params = DEFAULT
    read: list[tuple[int, ...]] = []
    decoder = model.model.decoder
    forward = decoder.forward
    monkeypatch.setattr(
        decoder,
        "forward",
        lambda **given: (read.append(tuple(given["inputs_embeds"].shape[:2])), forward(**given))[1],
    )
    DecodeLoop(model, ends=()).join([row])
    assert read == [(1, row.prompt_length)]


# --- what fails -----------------------------------------------------------------------------------


def test_scores_that_are_no_numbers_raise_and_leave_all_as_it_was() -> None:
    model = model_of(small_opt, (5,))
    some = some_rows(5, seed=21, longest=30)
    for row in some[:3]:
        row.params = replace(DEFAULT, min_new_tokens=20, max_new_tokens=30)
    expected = {row: by_generate(model, row, (5,)) for row in some}
    loop = DecodeLoop(model, ends=(5,), slots=8)
    loop.join(some)
    head = model.lm_head
    for _ in range(3):
        loop.step([row for row in loop.running if not row.ended])
        before = head.weight.clone()
        head.weight.fill_(float("nan"))
        with pytest.raises(ScoresError, match="not numbers"):
            loop.step([row for row in loop.running if not row.ended])
        head.weight.copy_(before)
    run(loop, [], random.Random(1))
    for row, what in expected.items():
        require_same(row, what)


def test_a_search_that_breaks_fails_alone() -> None:
    model = model_of(small_opt, (5,))
    good, bad = some_rows(2, seed=3)
    good.params = bad.params = DEFAULT
    bad.queries = bad.queries * float("nan")
    loop = DecodeLoop(model, ends=(5,))
    with pytest.raises(ScoresError):
        loop.join([good, bad])
    assert loop.running == []
    loop.join([good])
    run(loop, [], random.Random(1))
    require_same(good, by_generate(model, good, (5,)))
