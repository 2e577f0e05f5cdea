"""Where the matching head looked: equal to autograd by hand, and on the shape that a text names."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from benchmarks.heatmaps import Measured, cases, measured
from PIL import Image
from safetensors.torch import load_file

from blipq.errors import PermanentError
from blipq_worker import demo
from blipq_worker.blip2 import Blip2, ExplainItem, MatchItem
from blipq_worker.blip2.heads import heatmaps as module
from blipq_worker.catalog.prompts import match_text
from worker.conversion import lavis

TEXTS = ("a red circle above the dog", "two cats", "a question")


@pytest.fixture
def items(opt: Blip2, pictures: list[Image.Image]) -> list[ExplainItem]:
    return [ExplainItem(opt.preprocess(each), TEXTS) for each in pictures[:2]]


def by_hand(state: lavis.State, picture: Image.Image, ids: list[int]) -> Any:
    """The map of a text, (rows, columns), highest at 1."""
    image = lavis.seen(state, lavis.pixels(picture, 28))
    looked: list[torch.Tensor] = []
    tracked = {**state, "query_tokens": state["query_tokens"].clone().requires_grad_()}
    logit = lavis.matched(tracked, image, torch.tensor([ids]), looked)[0, 1]
    (gradient,) = torch.autograd.grad(logit, looked[-1])
    positive = torch.clamp(looked[-1] * gradient, min=0)[0]  # (heads, queries, 1 + patches)
    map_ = positive.sum(dim=(0, 1))[1:].reshape(2, 2).detach()
    return (map_ / map_.max()).numpy()


def test_a_texts_map_equals_autograd_by_hand(
    opt: Blip2, checkpoints: dict[str, Path], items: list[ExplainItem], pictures: list[Image.Image]
) -> None:
    state = lavis.as_lavis(load_file(checkpoints["itm"] / "model.safetensors"))
    assert opt.matcher is not None
    for picture, found in zip(pictures, opt.explain(items), strict=False):
        for number, text in enumerate(TEXTS):
            expected = by_hand(state, picture, opt.matcher.texts.ids(text))
            np.testing.assert_allclose(found[str(number)][0], expected, atol=1e-4)


def test_every_word_has_a_map(opt: Blip2, items: list[ExplainItem]) -> None:
    found = opt.explain(items)[0]
    assert [found[str(n)].shape for n in range(3)] == [(7, 2, 2), (3, 2, 2), (3, 2, 2)]
    for maps in found.values():
        assert maps.dtype == np.float32
        assert maps.min() >= 0
        assert maps[0].max() == pytest.approx(1.0)


def test_words_that_the_head_does_not_read_have_none(
    opt: Blip2, pictures: list[Image.Image]
) -> None:
    item = ExplainItem(opt.preprocess(pictures[0]), ("a cat " * 20, ""))
    (found,) = opt.explain([item])
    assert found["0"].shape[0] == 1 + 30  # of 32 tokens two are [CLS] and [SEP]
    assert found["1"].shape[0] == 1


@pytest.mark.parametrize("nothing", ["\u200b", "\x07", "\u200b\u200d"])
def test_a_word_without_tokens_shifts_no_other_words_map(
    opt: Blip2, pictures: list[Image.Image], nothing: str
) -> None:
    """Its own is of zeros."""
    text = f"a red {nothing} circle {nothing}"
    (found,) = opt.explain([ExplainItem(opt.preprocess(pictures[0]), (text, "a red circle"))])
    assert len(match_text(text).split()) == 5
    np.testing.assert_allclose(found["0"][[0, 1, 2, 4]], found["1"], atol=1e-4)
    assert found["0"][4].max() > 0
    assert not found["0"][[3, 5]].any()


def test_words_that_the_tokenizer_reads_as_one_shift_no_other(opt: Blip2) -> None:
    """To Python this character ends a word, to the tokenizer it is nothing."""
    assert opt.matcher is not None
    texts = opt.matcher.texts
    ids = texts.ids("c\x85at dog")
    assert ids == texts.ids("cat dog")
    assert texts.words("c\x85at dog") == [range(1, 2), range(2, 2), range(2, 3)]


def test_neighbours_and_chunks_do_not_change_a_map(
    opt: Blip2, items: list[ExplainItem], monkeypatch: pytest.MonkeyPatch
) -> None:
    together = opt.explain(items)
    monkeypatch.setattr(module, "_AT_ONCE", 3)
    for item, expected in zip(items, together, strict=True):
        (alone,) = opt.explain([item])
        for name, maps in alone.items():
            np.testing.assert_allclose(maps, expected[name], atol=1e-4)


def test_explaining_leaves_the_served_model_as_it_was(opt: Blip2, items: list[ExplainItem]) -> None:
    assert opt.matcher is not None
    match = [MatchItem(each.pixels, TEXTS) for each in items]
    before = opt.match(match)
    opt.explain(items)
    assert opt.match(match) == before
    assert all(not each.requires_grad for each in opt.matcher.model.parameters())
    assert all(each.grad is None for each in opt.matcher.model.parameters())


def test_without_a_retrieval_checkpoint_there_are_no_maps(
    t5: Blip2, pictures: list[Image.Image]
) -> None:
    with pytest.raises(PermanentError, match="no retrieval checkpoint"):
        t5.explain([ExplainItem(t5.preprocess(pictures[0]), TEXTS)])


def test_maps_lie_on_the_shape_that_a_text_or_a_word_names() -> None:
    """At least twice its share of the area, in nine of ten scenes."""
    model = Blip2.load(str(demo.OPT), str(demo.ITM), dtype="float32")
    found: Measured = measured(model, cases(60))
    assert found.texts >= 0.9
    assert found.words >= 0.85  # 0.9 of many, see docs/heat-maps.md
