"""Sampled beams in flight: transformers' search, by draws that depend on no neighbour."""

import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from benchmarks.by_generate import quiet_about_penalties
from msgspec.structs import replace
from transformers import GenerationMixin

from blipq_worker.blip2.decoding import DecodeLoop, Row, row_seed
from blipq_worker.blip2.decoding.beams import NONE, Beams, choose_beams
from blipq_worker.blip2.decoding.sampling import gumbel
from blipq_worker.inference.requests import GenerationParams
from worker.blip2.decoding.test_beams import (
    VOCABULARY,
    model_of,
    require_same,
    run,
    small_opt,
    small_t5,
    some_rows,
)


def sampled_rows(number: int, seed: int) -> list[Row]:
    """Rows of all parameters, of which most draw."""
    dice, some = random.Random(seed), some_rows(number, seed, longest=14)
    for index, row in enumerate(some):
        row.seed = row_seed(seed, index)
        row.params = replace(
            row.params,
            num_beams=max(2, row.params.num_beams),
            do_sample=dice.random() < 0.85,
            temperature=dice.choice([0.7, 1.0, 1.5]),
            top_p=dice.choice([0.5, 0.9, 1.0]),
            top_k=dice.choice([0, 20, 50]),
        )
    return some


def generated(
    model: Any, row: Row, ends: Sequence[int], monkeypatch: pytest.MonkeyPatch
) -> tuple[list[list[int]], list[float]]:
    """What ``generate`` writes when its draws are made with this row's noise."""
    params, original = row.params, GenerationMixin._get_top_k_continuations
    tokens = torch.arange(VOCABULARY)[None]

    def with_noise(self: Any, accumulated_log_probs: torch.Tensor, **given: Any) -> Any:
        step = given["cur_len"] - given["decoder_prompt_len"]
        ranks = torch.arange(given["num_beams"])[:, None] * (step > 0)
        noise = gumbel(tokens, torch.tensor(row.seed), torch.tensor(step), ranks).view(1, -1)

        def draw(probabilities: torch.Tensor, num_samples: int) -> torch.Tensor:
            return (accumulated_log_probs + noise).topk(num_samples).indices

        with monkeypatch.context() as patch:
            patch.setattr(torch, "multinomial", draw)
            return original(self, accumulated_log_probs=accumulated_log_probs, **given)

    embeds = torch.cat([row.queries, model.get_input_embeddings()(torch.tensor(row.ids))])[None]
    with monkeypatch.context() as patch, quiet_about_penalties(), torch.inference_mode():
        patch.setattr(GenerationMixin, "_get_top_k_continuations", with_noise)
        drawn = {"temperature": params.temperature, "top_k": params.top_k, "top_p": params.top_p}
        said = model.generate(
            inputs_embeds=embeds,
            attention_mask=torch.ones(embeds.shape[:2], dtype=torch.long),
            eos_token_id=list(ends),
            pad_token_id=1,
            do_sample=params.do_sample,
            num_beams=params.num_beams,
            max_new_tokens=params.max_new_tokens,
            min_new_tokens=params.min_new_tokens,
            repetition_penalty=params.repetition_penalty,
            no_repeat_ngram_size=params.no_repeat_ngram_size,
            length_penalty=params.length_penalty,
            num_return_sequences=params.num_return_sequences,
            return_dict_in_generate=True,
            output_scores=True,
            **(drawn if params.do_sample else {}),
        )
    texts = said.sequences[:, 1 if model.config.is_encoder_decoder else 0 :].tolist()
    cut = [
        next((at for at, token in enumerate(text) if token in ends), len(text)) for text in texts
    ]
    return [t[: at + 1] for t, at in zip(texts, cut, strict=True)], said.sequences_scores.tolist()


@pytest.mark.parametrize("stopping", [None, True, "never"])
@pytest.mark.parametrize("make", [small_opt, small_t5])
def test_with_the_same_draws_sampled_beams_write_what_generate_writes(
    make: Any, stopping: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of all parameters, together and beside searches that do not draw, as they come.

    Where fewer texts than beams may be drawn, ``generate`` fills up with any of them, at a score
    of -1e9; which of these it takes is no part of the promise.
    """
    compared = fillers = 0
    for ends in ((5,), (5, 6, 7)):
        model = model_of(make, ends, stopping)
        some = sampled_rows(30, seed=len(ends) + 40)
        expected = {row: generated(model, row, ends, monkeypatch) for row in some}
        run(DecodeLoop(model, ends=ends, slots=9), some, random.Random(4))
        for row, (texts, scores) in expected.items():
            drawn = sum(score > NONE / 2 for score in scores)
            assert [score > NONE / 2 for score in row.scores[:drawn]] == [True] * drawn
            fillers += len(texts) - drawn
            row.texts, row.scores = row.texts[:drawn], row.scores[:drawn]
            require_same(row, (texts[:drawn], scores[:drawn]))
            compared += drawn
    assert fillers < compared / 50


@pytest.mark.parametrize("make", [small_opt, small_t5])
def test_a_seed_decides_what_sampled_beams_write_whoever_is_beside_them(make: Any) -> None:
    model = model_of(make, (5,))
    first, again = sampled_rows(20, seed=9), sampled_rows(20, seed=9)
    run(DecodeLoop(model, ends=(5,), slots=20), first, random.Random(1))
    for row in again:
        run(DecodeLoop(model, ends=(5,), slots=1), [row], random.Random(2))
    assert [row.texts for row in first] == [row.texts for row in again]
    other = sampled_rows(20, seed=9)
    for row in other:
        row.seed += 1
    run(DecodeLoop(model, ends=(5,), slots=20), other, random.Random(1))
    changed = [
        mine.texts != theirs.texts
        for mine, theirs in zip(first, other, strict=True)
        if mine.params.do_sample
    ]
    assert sum(changed) > len(changed) / 2


def test_beams_are_drawn_without_replacement_by_the_softmax_of_their_sums() -> None:
    """Ordered pairs of candidates come as often as two draws from an urn would give them."""
    times, ends = 20_000, torch.tensor([9])
    params = GenerationParams(num_beams=2, do_sample=True, max_new_tokens=5)
    row = Row(torch.zeros(1, 1), [1], params)
    state = Beams.fresh([row] * times, (), torch.device("cpu"))
    state.scores[:] = torch.tensor([-0.3, -1.1])
    logs = torch.full((2, 10), -torch.inf)
    logs[0, :3], logs[1, :3] = torch.tensor([-0.5, -1.5, -2.5]), torch.tensor([-0.7, -0.9, -3.0])
    lanes = torch.arange(2 * times).view(times, 2)
    seeds = torch.tensor([row_seed(index) for index in range(times)]).repeat_interleave(2)[:, None]
    ranks = torch.arange(2).repeat(times)[:, None]
    noise = gumbel(torch.arange(10)[None], seeds, torch.zeros_like(seeds), ranks)
    chosen = choose_beams(
        logs.repeat(times, 1), lanes, state, ends=ends, skipped=0, stopping=False, noise=noise
    )
    found = Counter(zip(chosen.parents[:, 0].tolist(), chosen.tokens[:, 0].tolist(), strict=True))
    # The best two of four drawn go on: the chances of which is the best, by counting all draws.
    sums = (logs[:, :3] + torch.tensor([[-0.3], [-1.1]])).flatten()
    shares = sums.softmax(0).double()
    expected = best_of_draws(shares.tolist(), sums.tolist(), draws=4)
    for place, share in expected.items():
        spread = (share * (1 - share) / times) ** 0.5
        assert abs(found[divmod(place, 3)] / times - share) < 4.5 * spread + 1e-9


def best_of_draws(shares: list[float], sums: list[float], draws: int) -> dict[int, float]:
    """How likely each place is the one with the largest sum among those drawn."""
    chances: dict[int, float] = dict.fromkeys(range(len(shares)), 0.0)

    def draw(taken: tuple[int, ...], chance: float) -> None:
        if len(taken) == draws:
            chances[max(taken, key=sums.__getitem__)] += chance
            return
        left = 1 - sum(shares[place] for place in taken)
        for place in set(chances) - set(taken):
            draw((*taken, place), chance * shares[place] / left)

    draw((), 1.0)
    return chances
