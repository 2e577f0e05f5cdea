"""How sure a model was of what it wrote is what one pass over the whole text finds.

Whatever the loop, and whatever chose the tokens: the numbers are of the model's own distribution.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import astuple
from typing import Any

import pytest
import torch
from benchmarks.confidence import endless, scenes, written
from msgspec import structs
from msgspec.structs import replace

from blipq_worker.blip2 import Blip2, GeneratedText, GenerateItem, Pixels
from blipq_worker.blip2.decoding import DecodeLoop, Row
from blipq_worker.blip2.decoding.static import Way, static_loop
from blipq_worker.blip2.decoding.static.attention.methods import MaskedAttention
from blipq_worker.blip2.text import repetition
from blipq_worker.demo.world.drawing import render
from blipq_worker.engine import verbs
from blipq_worker.inference.requests import GenerationParams
from worker.in_flight import GREEDY, write
from worker.tiny_models import PLAIN_WIDTH, plain_opt, plain_t5

VOCABULARY = 300
ENDS = (5, 6)
#: Static slots, eagerly and by what stands in for graphs.
WAYS = (Way(MaskedAttention, None), Way(MaskedAttention, lambda: lambda run: run))
SLOTS = 12


def small(family: str) -> Any:
    """Random weights under which texts end now and then."""
    torch.manual_seed(3)
    if family == "opt":
        made: Any = plain_opt(VOCABULARY, positions=700, spread=0.25)
    else:
        made = plain_t5(VOCABULARY, spread=1.0)
    head = torch.randn(VOCABULARY, PLAIN_WIDTH) * (0.4 if family == "opt" else 0.6)
    head[list(ENDS)] *= 1.6
    made = made.eval().requires_grad_(False)
    made.lm_head.weight = torch.nn.Parameter(head, requires_grad=False)
    return made


def of_all_kinds(dice: random.Random, longest: int = 20) -> GenerationParams:
    beams = dice.choice([1, 1, 2, 3, 5])
    limit = dice.randint(1, longest)
    sampled = dice.random() < 0.5
    return GenerationParams(
        num_beams=beams,
        max_new_tokens=limit,
        min_new_tokens=dice.choice([0, 0, dice.randint(0, limit)]),
        do_sample=sampled,
        temperature=dice.uniform(0.3, 2.5),
        top_p=dice.choice([0.6, 1.0]),
        top_k=dice.choice([0, 5, 50]),
        repetition_penalty=dice.choice([1.0, 0.8, 1.5]),
        no_repeat_ngram_size=dice.choice([0, 0, 1, 2]),
        length_penalty=dice.choice([-1.0, 0.0, 1.0]),
        num_return_sequences=dice.randint(1, beams),
    )


def some_rows(number: int, seed: int) -> list[Row]:
    dice, numbers = random.Random(seed), torch.Generator().manual_seed(seed)
    return [
        Row(
            torch.randn(8, PLAIN_WIDTH, generator=numbers) * 0.7,
            [dice.randrange(8, VOCABULARY) for _ in range(dice.randint(1, 9))],
            of_all_kinds(dice),
            dice.getrandbits(62),
        )
        for _ in range(number)
    ]


@torch.inference_mode()
def teacher_forced(
    model: Any, queries: torch.Tensor, ids: Sequence[int], text: Sequence[int]
) -> list[float]:
    """The log-probability of each token of a text, by one pass that reads all of it."""
    embed = model.get_input_embeddings()

    def embedded(tokens: Sequence[int]) -> torch.Tensor:
        found: torch.Tensor = embed(torch.tensor(tokens, dtype=torch.long))
        return found

    prompt = torch.cat([queries, embedded(ids)])
    if model.config.is_encoder_decoder:
        start = model.config.decoder_start_token_id
        before = torch.tensor([[start, *text[:-1]]])
        scores = model(inputs_embeds=prompt[None], decoder_input_ids=before).logits[0]
    else:
        whole = torch.cat([prompt, embedded(text[:-1])])
        scores = model(inputs_embeds=whole[None]).logits[0, len(prompt) - 1 :]
    logs = scores.float().log_softmax(dim=-1)
    found: list[float] = logs.gather(-1, torch.tensor(text)[:, None])[:, 0].tolist()
    return found


def require_own(model: Any, rows: Sequence[Row]) -> None:
    """Every text of these rows has the numbers of its teacher-forced pass."""
    for row in rows:
        assert row.outputs, row.params
        for text in row.outputs:
            expected = teacher_forced(model, row.queries, row.ids, text.tokens)
            assert text.logs == pytest.approx(expected, abs=1e-4), row.params
            assert math.fsum(text.logs) == pytest.approx(math.fsum(expected), abs=1e-4)


@pytest.mark.parametrize("family", ["opt", "t5"])
def test_growing_slots_say_how_likely_each_token_was(family: str) -> None:
    """Greedy, sampled and beams of all penalties, beside each other."""
    model, rows = small(family), some_rows(40, seed=1)
    write(DecodeLoop(model, ends=ENDS, slots=9), rows)
    require_own(model, rows)
    assert sum(len(row.outputs) for row in rows if row.has_beams) > 25
    assert sum(row.tokens[-1] in ENDS for row in rows if not row.has_beams) > 1


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", ["opt", "t5"])
def test_static_slots_say_how_likely_each_token_was(family: str, way: Way) -> None:
    """Along the ancestry of beams, in slots that others were in before."""
    model, rows = small(family), some_rows(40, seed=2)
    loop = static_loop(model, ends=ENDS, slots=SLOTS, budget=0, among=[way])
    assert loop is not None
    write(loop, rows)
    require_own(model, rows)
    assert sum(len(row.outputs) for row in rows if row.has_beams) > 25


@pytest.mark.parametrize("name", ["demo", "twin"])
def test_an_answer_has_the_numbers_of_its_text(name: str, request: pytest.FixtureRequest) -> None:
    """From prompts to the answer of a model: sum, mean, reason, tokens and each token's own."""
    model: Blip2 = request.getfixturevalue(name)
    writer = model.generator
    side = model.info.image_size
    torch.manual_seed(1)
    pixels = Pixels(torch.randint(256, (side, side, 3), dtype=torch.uint8))
    prompts = ("a photo of", "Question: what is it? Answer:", "")
    kinds = [
        GenerationParams(logprobs=True),
        GenerationParams(num_return_sequences=4, logprobs=True, repetition_penalty=1.5),
        replace(GREEDY, logprobs=True, max_new_tokens=3),
        GenerationParams(
            num_beams=1, do_sample=True, temperature=2.0, seed=3, num_return_sequences=3,
            logprobs=True,
        ),
    ]  # fmt: skip
    answers = model.generate([GenerateItem(pixels, prompts, each) for each in kinds])
    (queries,) = writer.project([pixels])
    reasons = set()
    pairs = [pair for answer in answers for pair in zip(prompts, answer, strict=True)]
    for prompt, text in ((prompt, text) for prompt, texts in pairs for text in texts):
        assert text.logprobs is not None
        ids = [token for token, _, _ in text.logprobs]
        logs = teacher_forced(writer.model.language_model, queries, writer.ids(prompt), ids)
        assert text.tokens == len(ids)
        assert text.log_likelihood == pytest.approx(sum(logs), abs=1e-4)
        mean = sum(map(math.exp, logs)) / len(logs)
        assert text.mean_token_probability == pytest.approx(mean, abs=1e-4)
        assert text.finish_reason == ("stop" if ids[-1] in writer._eos else "length")
        reasons.add(text.finish_reason)
    assert reasons == {"stop", "length"}


def test_tokens_are_listed_only_for_who_wants_them(demo: Blip2) -> None:
    side = demo.info.image_size
    pixels = Pixels(torch.zeros((side, side, 3), dtype=torch.uint8))
    (((text,),),) = demo.generate([GenerateItem(pixels, ("",), GREEDY)])
    assert text.logprobs is None
    assert text.log_likelihood is not None


def test_what_the_engine_hands_on_has_all_that_is_known_of_a_text() -> None:
    logprobs = ((7, " a", -0.5), (8, " dog", -1.0))
    text = GeneratedText("a dog", 2, -1.5, 0.5, "stop", rewritten=True, logprobs=logprobs)
    ((found,),) = verbs.GENERATE.value([[text]]).texts  # type: ignore[union-attr]
    assert structs.astuple(found) == astuple(text)


def test_the_text_of_a_token_is_made_once(demo: Blip2, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = demo.generator._tokenizer
    decode, made = tokenizer.decode, []

    def count(ids: Sequence[int], **options: Any) -> str:
        if not options:
            made.extend(ids)
        return str(decode(ids, **options))

    monkeypatch.setattr(tokenizer, "decode", count)
    demo.generator._token_text.cache_clear()
    side = demo.info.image_size
    pixels = Pixels(torch.zeros((side, side, 3), dtype=torch.uint8))
    item = GenerateItem(pixels, ("",), replace(GREEDY, logprobs=True))
    for _ in range(2):
        (((text,),),) = demo.generate([item])
    assert text.logprobs is not None
    assert all(one == decode([token]) for token, one, _ in text.logprobs)
    assert sorted(made) == sorted(set(ids_of(text)))


# --- loops ----------------------------------------------------------------------------------------

LIST = [10, 11, 12, 13, 14, 11, 12, 15, 16, 11, 12, 17, 18, 11, 12, 19]


@pytest.mark.parametrize(
    ("tokens", "kept"),
    [
        ([7] * 16, 1),
        ([1, 2, 3] + [7] * 16, 4),
        ([1, 2] * 8, 2),
        ([9, *[1, 2, 3] * 6], 4),
        ([9, *[1, 2, 3] * 6, 1], 4),
        ([9, 8, *[1, 2, 3, 4, 5] * 4], 7),
        (list(range(40)) + list(range(16)) * 4, 56),
        ([7] * 15, None),
        ([1, 2] * 7 + [1], None),
        ([1, 2, 3] * 5, None),
        ([1, 2, 3, 4, 5] * 3 + [1, 2, 3, 4], None),
        ([1, 2, 3] * 6 + [9], None),
        (LIST, None),
        (list(range(60)), None),
        ([], None),
    ],
)
def test_a_loop_is_a_phrase_said_four_times_to_the_end(tokens: list[int], kept: int | None) -> None:
    assert repetition.kept(tokens) == kept


@pytest.mark.parametrize(
    "tokens",
    [
        [8] * 8,  # 88888888: Llama's digits are tokens
        [0, 20, *[3] * 8],  # 0.33333333
        [1, *[4, 50] * 3],  # 1,000,000,000: OPT's groups are
        [1, *[4, 50] * 6],
    ],
)
def test_a_number_of_equal_digits_or_groups_is_no_loop(tokens: list[int]) -> None:
    for length in range(len(tokens) + 1):
        assert repetition.kept(tokens[:length]) is None


@pytest.mark.parametrize("beams", [1, 2])
def test_a_text_that_the_model_has_ended_is_left_as_it_is(beams: int) -> None:
    said = [8] * 18
    longest = len(said) + 2
    params = replace(GREEDY, num_beams=beams, max_new_tokens=longest, on_loop="end")
    row = Row(torch.zeros(1, 1), [1], params)
    if beams == 1:
        row.tokens, row.logs = list(said), [-0.5] * len(said)
        row.write(ENDS[0], -0.5, ENDS)
    else:
        texts = [[*said, ENDS[0]], [*said, 9, 8]]
        row.settle(texts, [-1.0, -2.0], [[-0.5] * len(text) for text in texts], ENDS)
    assert row.ended
    assert row.outputs[0].tokens == [*said, ENDS[0]]
    assert not any(text.looped for text in row.outputs)
    row.settle([said], [-1.0], [[-0.5] * len(said)], ENDS)
    assert row.kept == {0: 1}, "one that nobody ended is a loop"


def test_phrases_that_vary_are_a_loop_where_most_of_them_were_said_before() -> None:
    """A long sentence over and over, with another word each time: no period has it."""
    sentence = list(range(20, 38))
    tokens = [9]
    for number in range(5):
        tokens += [*sentence, 100 + number]
    found = repetition.kept(tokens)
    assert found is not None
    assert found < len(tokens) - repetition.SHARE_OF + len(sentence)
    few = [each for number in range(10) for each in (1, 2, 3, 100 + number, 200 + number)]
    assert repetition.kept(few) is None, "a list of which the half is new"


def test_what_must_be_written_is_no_loop() -> None:
    assert repetition.kept([7] * 20, least=1) == 1
    assert repetition.kept([7] * 20, least=2) is None


def looping(family: str) -> Any:
    """A random model that says the same over and over."""
    torch.manual_seed(3)
    if family == "opt":
        made: Any = plain_opt(VOCABULARY, positions=700, spread=0.1)
    else:
        made = plain_t5(VOCABULARY, spread=1.0)
    return made.eval().requires_grad_(False)


def looping_rows(on_loop: Any, number: int = 12, **changes: Any) -> list[Row]:
    rows = some_rows(number, seed=4)
    for row in rows:
        fields = {"num_beams": 1, "max_new_tokens": 90, "min_new_tokens": 0} | changes
        row.params = GenerationParams(on_loop=on_loop, **fields)
    return rows


@pytest.mark.parametrize("family", ["opt", "t5"])
def test_loops_end_early_and_alike_in_all_slots(family: str) -> None:
    """Whoever runs beside them, and however late the host reads tokens."""
    model = looping(family)
    free, alone = looping_rows("keep"), looping_rows("end")
    write(DecodeLoop(model, ends=(), slots=5), free)
    write(DecodeLoop(model, ends=(), slots=1), alone)
    looped = [row for row in alone if row.kept]
    assert len(looped) > len(alone) / 2, "hardly any is a loop"
    for row, whole in zip(alone, free, strict=True):
        assert row.tokens == whole.tokens[: len(row.tokens)]
        (text,) = row.outputs
        assert text.looped == bool(row.kept)
        assert 0 < len(text.tokens) <= len(row.tokens)
        assert len(text.tokens) == len(text.logs)
    assert max(len(row.tokens) for row in looped) < 90
    for way in WAYS:
        static = static_loop(model, ends=(), slots=3, budget=0, among=[way])
        assert static is not None
        rows = looping_rows("end")
        write(static, rows)
        assert [row.outputs[0].tokens for row in rows] == [row.outputs[0].tokens for row in alone]


@pytest.mark.parametrize("family", ["opt", "t5"])
def test_a_loop_that_beams_agree_on_is_cut_from_their_texts(family: str) -> None:
    model = looping(family)
    rows = looping_rows("end", num_beams=3, max_new_tokens=40, num_return_sequences=3)
    write(DecodeLoop(model, ends=(), slots=4), rows)
    looped = [text for row in rows for text in row.outputs if text.looped]
    assert len(looped) > 3
    for text in looped:
        assert 0 < len(text.tokens) == len(text.logs) < 40
    static = static_loop(model, ends=(), slots=12, budget=0, among=WAYS[:1])
    assert static is not None
    again = looping_rows("end", num_beams=3, max_new_tokens=40, num_return_sequences=3)
    write(static, again)
    assert [text.tokens for row in again for text in row.outputs] == [
        text.tokens for row in rows for text in row.outputs
    ]


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("name", ["demo", "twin"])
def test_a_loop_is_written_again_without_repetitions_where_that_is_wanted(
    name: str, beams: int, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a model that knows no end; beside others, which say what they say without it."""
    model: Blip2 = request.getfixturevalue(name)
    monkeypatch.setattr(model.generator, "_eos", [])
    images = [model.preprocess(render(each.scene)) for each in scenes(4)]
    params = GenerationParams(
        num_beams=beams, max_new_tokens=60, min_new_tokens=0, logprobs=True, length_penalty=0.0
    )

    def texts(on_loop: Any) -> list[GeneratedText]:
        chosen = replace(params, on_loop=on_loop)
        items = [GenerateItem(image, ("", "a photo of"), chosen) for image in images]
        return [text for prompts in model.generate(items) for (text,) in prompts]

    free, ended, again = texts("keep"), texts("end"), texts("rewrite")
    looped = [text.finish_reason == "loop" for text in ended]
    assert any(looped), "nothing loops"
    assert [text.rewritten for text in again] == looped
    assert not any(text.rewritten for text in [*free, *ended])
    for text, cut, once_more, is_loop in zip(free, ended, again, looped, strict=True):
        if not is_loop:
            assert text == cut == once_more
            continue
        assert ids_of(cut) == ids_of(text)[: cut.tokens]
        new = ids_of(once_more)
        assert len(new) > 3
        phrases = [tuple(new[at : at + 3]) for at in range(len(new) - 2)]
        assert len(set(phrases)) == len(phrases)


def test_of_beams_only_the_texts_that_loop_are_written_again(
    demo: Blip2, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others stay in their places, and none is there twice."""
    images = [demo.preprocess(render(each.scene)) for each in scenes(2)]
    params = GenerationParams(num_beams=3, num_return_sequences=3, max_new_tokens=30, logprobs=True)
    settle = Row.settle

    def loop_first(row: Row, *found: Any) -> None:
        settle(row, *found)
        if row.params.on_loop == "rewrite":
            row.kept[0] = 2

    monkeypatch.setattr(Row, "settle", loop_first)

    def texts(on_loop: Any) -> list[list[GeneratedText]]:
        chosen = replace(params, on_loop=on_loop)
        items = [GenerateItem(image, ("", "a photo of"), chosen) for image in images]
        return [texts for prompts in demo.generate(items) for texts in prompts]

    free, again = texts("keep"), texts("rewrite")
    for before, after in zip(free, again, strict=True):
        assert [text.rewritten for text in after] == [True, False, False]
        assert after[1:] == before[1:]
        assert ids_of(after[0]) not in map(ids_of, after[1:])


def ids_of(text: GeneratedText) -> list[int]:
    assert text.logprobs is not None
    return [token for token, _, _ in text.logprobs]


def test_endless_texts_of_the_demo_model_are_noticed_and_right_ones_are_left_alone(
    demo: Blip2,
) -> None:
    """As in docs/confidence.md, of fewer scenes."""
    found = endless(demo, list(scenes(24)))
    loops = [each for each in found if each.is_loop]
    assert len(loops) >= 15
    noticed = [each for each in loops if each.kept is not None]
    assert len(noticed) / len(loops) >= 0.95
    assert all(0 < (each.kept or 0) < each.written < len(each.tokens) for each in noticed)
    texts = list(written(demo, list(scenes(60))))
    assert sum(text.right for text in texts) > 150
    assert not [text for text in texts if text.finish_reason == "loop"]
