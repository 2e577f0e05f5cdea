"""Matching: equal to transformers' own forward, in batches, with padding, in any mix of heads."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import Blip2ForImageTextRetrieval, Blip2Processor

from blipq.contract import ErrorCode
from blipq.errors import PermanentError
from blipq_worker.blip2 import Blip2, MatchItem
from blipq_worker.blip2.heads import matching as module

TEXTS = ("a cat", "a dog on the left of the red circle above the square", "no")


def items(model: Blip2, pictures: list[Image.Image], head: Any) -> list[MatchItem]:
    return [MatchItem(model.preprocess(picture), TEXTS, head) for picture in pictures]


def by_transformers(folder: Path, picture: Image.Image, text: str, head: str) -> float:
    processor = Blip2Processor.from_pretrained(folder)
    network = Blip2ForImageTextRetrieval.from_pretrained(folder, dtype=torch.float32).eval()
    inputs = processor(images=picture, text=text, return_tensors="pt")
    with torch.no_grad():
        logits = network(**inputs, use_image_text_matching_head=head == "itm").logits_per_image
    return float(logits.softmax(dim=-1)[0, 1] if head == "itm" else logits[0, 0])


@pytest.mark.parametrize("head", ["itm", "itc"])
def test_scores_equal_those_of_transformers(
    opt: Blip2, checkpoints: dict[str, Path], pictures: list[Image.Image], head: str
) -> None:
    for picture, scores in zip(pictures, opt.match(items(opt, pictures, head)), strict=True):
        expected = [by_transformers(checkpoints["itm"], picture, text, head) for text in TEXTS]
        assert scores == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("head", ["itm", "itc"])
def test_neighbours_and_padding_do_not_change_a_score(
    opt: Blip2, pictures: list[Image.Image], head: str
) -> None:
    batch = items(opt, pictures, head)
    alone = [[opt.match([replace(i, texts=(t,))])[0][0] for t in TEXTS] for i in batch]
    for together, one_by_one in zip(opt.match(batch), alone, strict=True):
        assert together == pytest.approx(one_by_one, abs=1e-6)


def test_heads_may_be_mixed_in_a_batch(opt: Blip2, pictures: list[Image.Image]) -> None:
    itm, itc = items(opt, pictures[:1], "itm"), items(opt, pictures[1:2], "itc")
    expected = [*opt.match(itm), *opt.match(itc)]
    for together, alone in zip(opt.match([*itm, *itc]), expected, strict=True):
        assert together == pytest.approx(alone, abs=1e-6)


@pytest.mark.parametrize("head", ["itm", "itc"])
def test_many_texts_are_scored_in_chunks(
    opt: Blip2, pictures: list[Image.Image], head: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = items(opt, pictures, head)
    whole = opt.match(batch)
    monkeypatch.setattr(module, "_PAIRS_AT_ONCE_ON_A_CPU", 2)
    for chunked, expected in zip(opt.match(batch), whole, strict=True):
        assert chunked == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("head", ["itm", "itc"])
def test_scores_depend_on_the_picture_and_on_the_text(
    opt: Blip2, pictures: list[Image.Image], head: str
) -> None:
    scores = opt.match(items(opt, pictures, head))
    assert len({round(score, 4) for item in scores for score in item}) == 4 * len(TEXTS)


def test_the_vision_tower_runs_once_per_item(opt: Blip2, pictures: list[Image.Image]) -> None:
    assert opt.matcher is not None
    seen: list[int] = []
    hook = opt.matcher.model.vision_model.register_forward_hook(
        lambda module, inputs, output: seen.append(len(output.last_hidden_state))
    )
    opt.match(items(opt, pictures, "itm"))
    hook.remove()
    assert seen == [4]


@pytest.mark.parametrize("head", ["itm", "itc"])
def test_texts_are_cleaned_and_cut_before_they_are_scored(
    opt: Blip2, pictures: list[Image.Image], head: Any
) -> None:
    pixels = opt.preprocess(pictures[0])
    texts = ("A Cat!", "a  cat", "a cat " * 20, "a cat " * 15)
    ((written, plain, long, cut),) = opt.match([MatchItem(pixels, texts, head)])
    assert written == pytest.approx(plain, abs=1e-6)
    assert long == pytest.approx(cut, abs=1e-6)


@pytest.mark.parametrize("text", ["", "!!!", "<image> [DEC] [SEP]", "ünïcödé 猫"])
def test_odd_texts_have_a_score(opt: Blip2, pictures: list[Image.Image], text: str) -> None:
    ((score,),) = opt.match([MatchItem(opt.preprocess(pictures[0]), (text,), "itm")])
    assert 0 <= score <= 1


def test_without_texts_there_are_no_scores(opt: Blip2, pictures: list[Image.Image]) -> None:
    assert opt.match([]) == []
    assert opt.match([MatchItem(opt.preprocess(pictures[0]), ())]) == [[]]


def test_without_a_retrieval_checkpoint_matching_is_unavailable(
    t5: Blip2, pictures: list[Image.Image]
) -> None:
    assert not t5.info.has_retrieval
    with pytest.raises(PermanentError) as caught:
        t5.match([MatchItem(t5.preprocess(pictures[0]), TEXTS)])
    assert caught.value.code == ErrorCode.MODEL_UNAVAILABLE
