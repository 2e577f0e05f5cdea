"""Generation: equal to transformers' own, alone or in a batch, and never blind."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import Blip2ForConditionalGeneration, Blip2Processor

from blipq.contract import ErrorCode
from blipq.errors import PermanentError
from blipq_worker.blip2 import Blip2, GeneratedText, GenerateItem
from blipq_worker.catalog.params import resolve
from blipq_worker.inference.requests import GenerationParams

PROMPTS = ("", "a photo of", "Question: what is above the cat? Short answer:")
GREEDY = {"num_beams": 1}
BEAMS = {"num_beams": 5, "length_penalty": -1.0, "num_return_sequences": 2}


def items(
    model: Blip2, pictures: list[Image.Image], prompts: tuple[str, ...] = PROMPTS, **overrides: Any
) -> list[GenerateItem]:
    params = resolve("caption", model.info, {"max_new_tokens": 8, **overrides})
    return [GenerateItem(model.preprocess(picture), prompts, params) for picture in pictures]


def by_transformers(
    folder: Path, family: str, pictures: list[Image.Image], **overrides: Any
) -> list[str]:
    """Texts by Blip2ForConditionalGeneration with <image> tokens, all prompts of each picture."""
    processor = Blip2Processor.from_pretrained(folder)
    if family == "opt":
        processor.tokenizer.padding_side = "left"
    network = Blip2ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    inputs = processor(
        images=[picture for picture in pictures for _ in PROMPTS],
        text=list(PROMPTS) * len(pictures),
        padding=True,
        return_tensors="pt",
    )
    minimum = 1 if family == "opt" else 0
    written = network.generate(**inputs, max_new_tokens=8, min_new_tokens=minimum, **overrides)
    if family == "opt":
        written = written[:, inputs["input_ids"].shape[1] :]
    texts: list[str] = processor.batch_decode(written, skip_special_tokens=True)
    return [text.strip() for text in texts]


@pytest.mark.parametrize("overrides", [GREEDY, BEAMS])
def test_texts_equal_those_of_transformers_with_image_tokens(
    either: Blip2,
    checkpoints: dict[str, Path],
    pictures: list[Image.Image],
    overrides: dict[str, Any],
) -> None:
    family = either.info.family
    answers = either.generate(items(either, pictures, **overrides))
    texts = [text.text.strip() for item in answers for prompt in item for text in prompt]
    assert texts == by_transformers(checkpoints[family], family, pictures, **overrides)


@pytest.mark.parametrize(
    "overrides", [GREEDY, BEAMS, {"repetition_penalty": 1.3}, {"no_repeat_ngram_size": 2}]
)
def test_a_batch_of_mixed_prompts_equals_one_at_a_time(
    either: Blip2, pictures: list[Image.Image], overrides: dict[str, Any]
) -> None:
    batch = items(either, pictures, **overrides)
    alone = [
        either.generate([replace(item, prompts=(prompt,))])[0][0]
        for item in batch
        for prompt in item.prompts
    ]
    assert [prompt for item in either.generate(batch) for prompt in item] == alone


def test_different_pictures_give_different_texts(
    either: Blip2, pictures: list[Image.Image]
) -> None:
    answers = either.generate(items(either, pictures, ("",)))
    assert len({answer[0][0].text for answer in answers}) > 1


def test_the_vision_tower_runs_once_whatever_the_prompts(
    either: Blip2, pictures: list[Image.Image]
) -> None:
    seen: list[int] = []
    hook = either.generator.model.vision_model.register_forward_hook(
        lambda module, inputs, output: seen.append(len(output.last_hidden_state))
    )
    either.generate(items(either, pictures[:3]))
    hook.remove()
    assert seen == [3]


def test_items_may_have_different_numbers_of_prompts(
    either: Blip2, pictures: list[Image.Image]
) -> None:
    one, two, none = items(either, pictures[:3])
    batch = [replace(one, prompts=PROMPTS[:1]), two, replace(none, prompts=())]
    assert [len(item) for item in either.generate(batch)] == [1, 3, 0]
    assert either.generate([replace(none, prompts=())]) == [[]]
    assert either.generate([]) == []


def test_a_text_ends_at_its_end_token(opt: Blip2, t5: Blip2) -> None:
    end = opt.generator._eos[0]
    (letter,) = opt.generator.ids("b")[1:]
    assert opt.generator.text([letter, end, letter, 1]) == GeneratedText("b", 2)
    assert opt.generator.text([letter, letter]) == GeneratedText("bb", 2)
    assert t5.generator.text([1, 0, 0]) == GeneratedText("", 1)


def test_opt_ends_with_the_line_feed_of_its_checkpoint(opt: Blip2) -> None:
    assert opt.generator._tokenizer.decode(opt.generator._eos) == "\n"


def test_lengths_count_new_tokens(either: Blip2, pictures: list[Image.Image]) -> None:
    lengths = {"min_new_tokens": 4, "max_new_tokens": 4}
    for (answer,) in either.generate(items(either, pictures, ("a photo of",), **lengths)):
        assert answer[0].tokens == 4


def test_an_image_token_in_a_prompt_is_plain_text(either: Blip2) -> None:
    image_token = either.generator._tokenizer.convert_tokens_to_ids("<image>")
    assert image_token not in either.generator.ids("a <image> b")


def test_an_end_token_in_a_prompt_is_plain_text(opt: Blip2) -> None:
    assert opt.generator.ids("a </s> b").count(2) == 1


# --- sampling -------------------------------------------------------------------------------------

SAMPLED = {"do_sample": True, "num_beams": 1, "temperature": 2, "top_p": 1.0, "seed": 11}


def test_a_seed_repeats_a_text_whatever_its_neighbours(
    either: Blip2, pictures: list[Image.Image]
) -> None:
    batch = items(either, pictures, **SAMPLED)
    together = either.generate(batch)
    assert either.generate(batch[2:3]) == together[2:3]
    assert either.generate(list(reversed(batch))) == list(reversed(together))


def test_another_seed_gives_other_texts(opt: Blip2, pictures: list[Image.Image]) -> None:
    first, second = (
        opt.generate(items(opt, pictures, **{**SAMPLED, "seed": seed})) for seed in (1, 2)
    )
    assert first != second


def test_a_seed_leaves_the_state_of_random_numbers_alone(
    opt: Blip2, pictures: list[Image.Image]
) -> None:
    before = torch.get_rng_state()
    opt.generate(items(opt, pictures[:1], **SAMPLED))
    assert torch.equal(torch.get_rng_state(), before)


def test_sampling_keeps_the_beams_by_default_as_lavis_does(
    either: Blip2, pictures: list[Image.Image]
) -> None:
    (answers,) = either.generate(
        items(either, pictures[:1], do_sample=True, num_return_sequences=3)
    )
    assert [len(alternatives) for alternatives in answers] == [3, 3, 3]


# --- limits ---------------------------------------------------------------------------------------


def test_a_prompt_that_is_too_long_is_an_invalid_request(
    either: Blip2, pictures: list[Image.Image]
) -> None:
    (item,) = items(either, pictures[:1], ("a photo of " * 1000,))
    for call in (lambda: either.generate([item]), lambda: either.check(item)):
        with pytest.raises(PermanentError, match="tokens, where this model has room") as caught:
            call()
        assert caught.value.code == ErrorCode.INVALID_REQUEST


def test_prompts_are_checked_in_other_threads_while_the_model_writes(
    opt: Blip2, pictures: list[Image.Image]
) -> None:
    batch = items(opt, pictures)
    expected = opt.generate(batch)
    with ThreadPoolExecutor(4) as threads:
        checks = [threads.submit(opt.check, batch[0]) for _ in range(200)]
        assert opt.generate(batch) == expected
        assert [check.result(timeout=60) for check in checks] == [None] * 200


def test_a_prompt_may_fill_the_positions_to_the_last(
    opt: Blip2, pictures: list[Image.Image]
) -> None:
    longest = 128 - 32 - 8 - 1  # positions - queries - new tokens - </s>
    fits, over = items(opt, pictures[:2], ("b" * longest,), min_new_tokens=8)
    opt.generate([fits])
    with pytest.raises(PermanentError):
        opt.generate([replace(over, prompts=("b" * (longest + 1),))])


# --- parameters -----------------------------------------------------------------------------------


def test_captions_default_to_laviss_parameters(either: Blip2) -> None:
    minimum = {"opt": 1, "t5": 0}[either.info.family]
    assert resolve("caption", either.info) == GenerationParams(
        max_new_tokens=30, min_new_tokens=minimum, num_beams=5, length_penalty=1.0
    )


def test_answers_default_to_laviss_parameters(either: Blip2) -> None:
    penalty = {"opt": 0.0, "t5": -1.0}[either.info.family]
    params = resolve("vqa", either.info, {})
    assert (params.max_new_tokens, params.num_beams, params.length_penalty) == (10, 5, penalty)


def test_what_is_given_wins_and_none_means_not_given(opt: Blip2) -> None:
    params = resolve("vqa", opt.info, {"max_new_tokens": 3, "num_beams": None})
    assert (params.max_new_tokens, params.num_beams) == (3, 5)


def test_parameters_without_effect_do_not_split_batches(opt: Blip2) -> None:
    idle = {"temperature": 0.5, "top_p": 0.1, "top_k": 3, "seed": 4}
    assert resolve("caption", opt.info, idle) == resolve("caption", opt.info)
    greedy = resolve("caption", opt.info, GREEDY)
    assert resolve("caption", opt.info, {**GREEDY, "length_penalty": 2}) == greedy


@pytest.mark.parametrize(
    "overrides",
    [
        {"num_return_sequences": 6},
        {"num_return_sequences": 2, "num_beams": 1},
        {"num_return_sequences": 6, "do_sample": True},
        {"min_new_tokens": 31},
        {"max_new_tokens": 0},
        {"beams": 3},
    ],
)
def test_combinations_that_cannot_run_are_invalid_requests(
    opt: Blip2, overrides: dict[str, Any]
) -> None:
    with pytest.raises(PermanentError) as caught:
        resolve("caption", opt.info, overrides)
    assert caught.value.code == ErrorCode.INVALID_REQUEST
