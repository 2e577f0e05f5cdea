"""Choices are ranked by the sum of their tokens' log-probabilities: see LAVIS's predict_class."""

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import Blip2ForConditionalGeneration, Blip2Processor

from blipq.errors import PermanentError
from blipq_worker.blip2 import Blip2, RankItem
from blipq_worker.blip2.heads import scoring as module
from blipq_worker.catalog.models import demo_folder

PROMPTS = ("Question: what is above the cat? Short answer:", "a photo of")
CHOICES = ("a red circle", "dog", "no", "two cats on the left of the square")


@pytest.fixture(params=["opt", "t5", "demo"])
def model(request: pytest.FixtureRequest) -> Blip2:
    """Each family with random weights, and the demo model."""
    if request.param != "demo":
        tiny: Blip2 = request.getfixturevalue(request.param)
        return tiny
    return Blip2.load(str(demo_folder() / "opt"), dtype="float32")


def items(model: Blip2, pictures: list[Image.Image]) -> list[RankItem]:
    return [RankItem(model.preprocess(picture), PROMPTS, CHOICES) for picture in pictures]


@cache
def loaded(folder: str) -> tuple[Any, Any]:
    network = Blip2ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    return Blip2Processor.from_pretrained(folder), network


def by_transformers(model: Blip2, picture: Image.Image, prompt: str, choice: str) -> float:
    """One forward pass of the whole model over one prompt and one choice, with <image> tokens."""
    processor, network = loaded(model.info.checkpoint)
    inputs = processor(images=picture, text=prompt, return_tensors="pt")
    answer = torch.tensor([model.generator.answer_ids(choice)])
    if model.info.family == "t5":
        with torch.no_grad():
            logits = network(**inputs, labels=answer).logits[0]
    else:
        ids = torch.cat([inputs["input_ids"], answer], dim=1)
        inputs |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        with torch.no_grad():
            logits = network(**inputs).logits[0, -answer.shape[1] - 1 : -1]
    chances = logits.log_softmax(dim=-1)
    return float(chances.gather(-1, answer[0][:, None]).sum())


def test_likelihoods_equal_those_of_transformers(model: Blip2, pictures: list[Image.Image]) -> None:
    found = model.rank(items(model, pictures[:2]))
    for picture, prompts in zip(pictures, found, strict=False):
        for prompt, likelihoods in zip(PROMPTS, prompts, strict=True):
            expected = [by_transformers(model, picture, prompt, choice) for choice in CHOICES]
            assert likelihoods == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("at_once", [3, 1000])
def test_neighbours_and_chunks_do_not_change_a_likelihood(
    either: Blip2, pictures: list[Image.Image], at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = items(either, pictures)
    batch[1] = replace(batch[1], prompts=("",), choices=("no", "yes"))
    alone = [either.rank([item])[0] for item in batch]
    monkeypatch.setattr(module, "_PAIRS_AT_ONCE", at_once)
    for together, one_by_one in zip(either.rank(batch), alone, strict=True):
        for found, expected in zip(together, one_by_one, strict=True):
            assert found == pytest.approx(expected, rel=1e-5)


def test_likelihoods_depend_on_picture_prompt_and_choice(
    either: Blip2, pictures: list[Image.Image]
) -> None:
    found = either.rank(items(either, pictures))
    numbers = {round(n, 3) for item in found for likelihoods in item for n in likelihoods}
    assert len(numbers) == len(pictures) * len(PROMPTS) * len(CHOICES)


def test_the_vision_tower_runs_once_per_item(either: Blip2, pictures: list[Image.Image]) -> None:
    seen: list[int] = []
    hook = either.generator.model.vision_model.register_forward_hook(
        lambda module, inputs, output: seen.append(len(output.last_hidden_state))
    )
    either.rank(items(either, pictures))
    hook.remove()
    assert seen == [4]


def test_an_answer_ends_with_its_end_token(opt: Blip2, t5: Blip2) -> None:
    for model in (opt, t5):
        ends: Any = model.generator.answer_ids("no")[-1]
        assert ends == model.generator._eos[0]


def test_a_prompt_that_does_not_fit_with_its_choices_is_refused(
    opt: Blip2, pictures: list[Image.Image]
) -> None:
    pixels = opt.preprocess(pictures[0])
    opt.check(RankItem(pixels, ("x" * 90,), ("no", "yes")))
    with pytest.raises(PermanentError, match="a prompt has 92 tokens") as caught:
        opt.check(RankItem(pixels, ("x" * 91,), ("no", "yes")))
    assert caught.value.code == "invalid_request"
