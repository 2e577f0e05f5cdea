"""Features: equal to transformers' own models, one at a time and in batches."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    Blip2ForImageTextRetrieval,
    Blip2Processor,
    Blip2TextModelWithProjection,
    Blip2VisionModelWithProjection,
)

from blipq.errors import PermanentError
from blipq_worker.blip2 import Blip2, EmbedItem, MatchItem
from blipq_worker.catalog.models import demo_folder

TEXTS = ("a cat", "a dog on the left of the red circle above the square", "no")
CLOSE = {"atol": 1e-5, "rtol": 0}


@pytest.fixture(scope="module", params=["tiny", "demo"])
def model(request: pytest.FixtureRequest) -> Blip2:
    """Random weights, and the demo model's."""
    if request.param == "tiny":
        tiny: Blip2 = request.getfixturevalue("opt")
        return tiny
    folder = demo_folder()
    return Blip2.load(str(folder / "opt"), str(folder / "itm"), dtype="float32")


def load(model_class: Any, model: Blip2) -> Any:
    return model_class.from_pretrained(model.info.retrieval_checkpoint, dtype=torch.float32).eval()


def inputs(model: Blip2, **given: Any) -> Any:
    processor = Blip2Processor.from_pretrained(Path(str(model.info.retrieval_checkpoint)))
    return processor(**given, return_tensors="pt")


def images(model: Blip2, pictures: list[Image.Image]) -> list[EmbedItem]:
    return [EmbedItem("image", model.preprocess(picture)) for picture in pictures]


def test_an_images_features_equal_those_of_transformers(
    model: Blip2, pictures: list[Image.Image]
) -> None:
    network = load(Blip2VisionModelWithProjection, model)
    for picture, found in zip(pictures, model.embed(images(model, pictures)), strict=True):
        pixels = inputs(model, images=picture)["pixel_values"]
        with torch.no_grad():
            projected = network(pixels).image_embeds[0]
            hidden = network.vision_model(pixels).last_hidden_state
            queries = network.qformer(
                query_embeds=network.query_tokens, encoder_hidden_states=hidden
            ).last_hidden_state[0]
        assert list(found) == ["image_embeds", "image_embeds_proj"]
        np.testing.assert_allclose(found["image_embeds"], queries, **CLOSE)
        projected = torch.nn.functional.normalize(projected, dim=-1)
        np.testing.assert_allclose(found["image_embeds_proj"], projected, **CLOSE)


def test_a_texts_features_equal_those_of_transformers(model: Blip2) -> None:
    network = load(Blip2TextModelWithProjection, model)
    items = [EmbedItem("text", text=text) for text in TEXTS]
    for text, found in zip(TEXTS, model.embed(items), strict=True):
        ids = model.embedder._texts.ids(text)  # type: ignore[union-attr]
        with torch.no_grad():
            answer = network(torch.tensor([ids]))
        projected = torch.nn.functional.normalize(answer.text_embeds[0], dim=-1)
        assert list(found) == ["text_embeds", "text_embeds_proj"]
        np.testing.assert_allclose(found["text_embeds"], answer.last_hidden_state[0], **CLOSE)
        np.testing.assert_allclose(found["text_embeds_proj"], projected, **CLOSE)


def test_features_of_both_equal_those_of_transformers(
    model: Blip2, pictures: list[Image.Image]
) -> None:
    network = load(Blip2ForImageTextRetrieval, model)
    pairs = list(zip(pictures, TEXTS, strict=False))
    items = [EmbedItem("multimodal", model.preprocess(picture), text) for picture, text in pairs]
    for (picture, text), found in zip(pairs, model.embed(items), strict=True):
        given = inputs(model, images=picture, text=text)
        with torch.no_grad():
            answer = network(**given, use_image_text_matching_head=True)
        queries = answer.text_model_output.last_hidden_state[0, :32]
        assert list(found) == ["multimodal_embeds"]
        np.testing.assert_allclose(found["multimodal_embeds"], queries, **CLOSE)


def test_the_cosine_of_features_is_the_itc_score(model: Blip2, pictures: list[Image.Image]) -> None:
    pixels = model.preprocess(pictures[0])
    (image,) = model.embed([EmbedItem("image", pixels)])
    texts = model.embed([EmbedItem("text", text=text) for text in TEXTS])
    cosines = [
        (image["image_embeds_proj"] @ text["text_embeds_proj"][0]).max().item() for text in texts
    ]
    (scores,) = model.match([MatchItem(pixels, TEXTS, "itc")])
    assert cosines == pytest.approx(scores, abs=1e-5)


def test_neighbours_of_any_mode_change_nothing(opt: Blip2, pictures: list[Image.Image]) -> None:
    pixels = [opt.preprocess(picture) for picture in pictures]
    batch = [
        EmbedItem("text", text="a cat"),
        EmbedItem("image", pixels[0]),
        EmbedItem("multimodal", pixels[1], TEXTS[1]),
        EmbedItem("text", text=TEXTS[1]),
        EmbedItem("image", pixels[2]),
        EmbedItem("multimodal", pixels[2], "no"),
    ]
    for item, together in zip(batch, opt.embed(batch), strict=True):
        (alone,) = opt.embed([item])
        assert together.keys() == alone.keys()
        for name, values in alone.items():
            np.testing.assert_allclose(together[name], values, **CLOSE)


def test_projections_have_length_one(opt: Blip2, pictures: list[Image.Image]) -> None:
    image, text = opt.embed([*images(opt, pictures[:1]), EmbedItem("text", text="a cat")])
    for values in (image["image_embeds_proj"], text["text_embeds_proj"]):
        np.testing.assert_allclose(np.linalg.norm(values, axis=-1), 1, **CLOSE)


def test_a_long_text_is_not_cut_where_matching_cuts_it(opt: Blip2) -> None:
    (found,) = opt.embed([EmbedItem("text", text="a " * 40)])
    assert len(found["text_embeds"]) == 42


def test_a_text_that_does_not_fit_is_refused(opt: Blip2) -> None:
    with pytest.raises(PermanentError, match="a text has 82 tokens") as caught:
        opt.check(EmbedItem("text", text="xx " * 40))
    assert caught.value.code == "invalid_request"
    opt.check(EmbedItem("text", text="xx " * 31))


def test_without_a_retrieval_checkpoint_there_are_no_features(t5: Blip2) -> None:
    item = EmbedItem("text", text="a")
    for ask in (t5.check, lambda item: t5.embed([item])):
        with pytest.raises(PermanentError) as caught:
            ask(item)
        assert caught.value.code == "model_unavailable"
