"""An image is looked at once: in a batch, in a job of many parts, and by the jobs that follow."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from blipq_worker.blip2 import (
    Blip2,
    EmbedItem,
    FeatureCache,
    GenerateItem,
    MatchItem,
    Pixels,
    RankItem,
)
from blipq_worker.blip2.cuda.batches import CapturedPass
from blipq_worker.blip2.vision import features
from blipq_worker.catalog.params import resolve
from worker.tiny_models import save_itm

TEXTS = ("a cat", "a red circle above the square")


def with_tower_of(generation: Path, folder: Path, **changes: torch.Tensor) -> Path:
    """A retrieval checkpoint whose vision tower is the generation checkpoint's."""
    save_itm(folder)
    weights = load_file(folder / "model.safetensors")
    tower = load_file(generation / "model.safetensors")
    for name in weights:
        if name.startswith("vision_model") and "post_layernorm" not in name:
            weights[name] = changes.get(name, tower[name])
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def same_tower(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_tower_of(checkpoints["opt"], tmp_path_factory.mktemp("same"))


def load(checkpoints: dict[str, Path], retrieval: Path, **options: Any) -> Blip2:
    options = {"dtype": "float32", "cache": FeatureCache(2**20), **options}
    return Blip2.load(str(checkpoints["opt"]), str(retrieval), **options)


@pytest.fixture
def model(checkpoints: dict[str, Path], same_tower: Path) -> Blip2:
    """Both checkpoints with one tower, and an empty cache."""
    return load(checkpoints, same_tower)


@contextmanager
def looks(model: Blip2) -> Iterator[list[int]]:
    """How many images each pass of a vision tower looks at."""
    seen: list[int] = []
    towers = {model.generator.model.vision_model, model.matcher.model.vision_model}  # type: ignore[union-attr]
    hooks = [
        tower.register_forward_hook(
            lambda module, inputs, output: seen.append(len(output.last_hidden_state))
        )
        for tower in towers
    ]
    yield seen
    for hook in hooks:
        hook.remove()


def asked(model: Blip2, pixels: Pixels) -> list[Any]:
    """Everything that can be asked about an image."""
    params = resolve("caption", model.info, {"max_new_tokens": 6})
    (texts,) = model.generate([GenerateItem(pixels, ("", "a photo of"), params)])
    (likelihoods,) = model.rank([RankItem(pixels, ("a photo of",), ("a cat", "a dog"))])
    (itm,) = model.match([MatchItem(pixels, TEXTS, "itm")])
    (itc,) = model.match([MatchItem(pixels, TEXTS, "itc")])
    (image,) = model.embed([EmbedItem("image", pixels)])
    (both,) = model.embed([EmbedItem("multimodal", pixels, TEXTS[0])])
    return [texts, likelihoods, itm, itc, *image.values(), *both.values()]


def same(found: list[Any], expected: list[Any], atol: float = 1e-5) -> None:
    assert found[0] == expected[0]
    for one, other in zip(found[1:], expected[1:], strict=True):
        np.testing.assert_allclose(one, other, atol=atol, rtol=atol)


def test_one_look_serves_all_that_a_job_asks(
    checkpoints: dict[str, Path], same_tower: Path, pictures: list[Image.Image]
) -> None:
    model = load(checkpoints, same_tower, cache=FeatureCache(0))
    with looks(model) as seen:
        asked(model, model.preprocess(pictures[0], whole=True))
    assert seen == [1]


def test_a_cpu_looks_at_as_many_images_at_once_as_its_caches_hold(
    checkpoints: dict[str, Path],
    same_tower: Path,
    pictures: list[Image.Image],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    together = load(checkpoints, same_tower)
    config = together.generator.model.config.vision_config
    tokens = (config.image_size // config.patch_size) ** 2 + 1
    monkeypatch.setattr(features, "_STATES_ON_A_CPU", 2 * tokens * config.intermediate_size * 4)
    in_twos = load(checkpoints, same_tower)
    found = []
    for model, passes in ((together, [3]), (in_twos, [2, 1])):
        with looks(model) as seen:
            found.append(
                model.generator.vision.patches([model.preprocess(p) for p in pictures[:3]])
            )
        assert seen == passes
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-5)


def test_captured_looks_find_the_same_for_any_number_of_images(
    checkpoints: dict[str, Path], same_tower: Path
) -> None:
    model = load(checkpoints, same_tower)
    side = model.info.image_size
    noise = torch.randint(256, (9, side, side, 3), dtype=torch.uint8)
    pixels = [Pixels(each) for each in noise]
    together = model.generator.project(pixels)
    model.generator.vision.capture(lambda run: run, most=6)
    for count in (1, 5, 6, 7, 9):
        with looks(model) as seen:
            found = model.generator.project([Pixels(each.generation) for each in pixels[:count]])
        torch.testing.assert_close(found, together[:count], atol=1e-5, rtol=1e-5)
        assert seen == [count if count > 6 else {1: 1, 5: 6, 6: 6}[count]]


def test_looks_that_cannot_be_captured_are_taken_as_they_are(
    checkpoints: dict[str, Path],
    same_tower: Path,
    pictures: list[Image.Image],
    caplog: pytest.LogCaptureFixture,
) -> None:
    def refuse(run: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing\n...")

    model = load(checkpoints, same_tower)
    expected = model.generator.project([model.preprocess(picture) for picture in pictures])
    model.generator.vision.capture(refuse, most=8)
    found = model.generator.project([model.preprocess(picture) for picture in pictures])
    assert torch.equal(found, expected)
    assert len([each for each in caplog.messages if "not permitted" in each]) == 2


def test_a_graph_that_finds_other_numbers_is_not_used() -> None:
    wrong = CapturedPass(lambda batch: batch * 2)
    with torch.inference_mode():
        wrong.prepare(torch.ones(3), lambda run: lambda: None, most=4)
        assert len(wrong) == 0
        assert torch.equal(wrong(torch.ones(2, 3)), 2 * torch.ones(2, 3))


@pytest.mark.parametrize(("dtype", "products"), [("float32", "none"), ("bfloat16", "tf32")])
def test_texts_about_16_bits_need_no_full_fp32_and_matching_does(
    checkpoints: dict[str, Path],
    pictures: list[Image.Image],
    monkeypatch: pytest.MonkeyPatch,
    dtype: Any,
    products: str,
) -> None:
    model = Blip2.load(str(checkpoints["opt"]), str(checkpoints["itm"]), dtype=dtype)
    precisions: list[str] = []
    query_features = features.query_features

    def noted(*args: Any) -> torch.Tensor:
        precisions.append(torch.backends.cuda.matmul.fp32_precision)
        return query_features(*args)

    monkeypatch.setattr(features, "query_features", noted)
    pixels = model.preprocess(pictures[0])
    model.generator.project([pixels])
    assert model.matcher is not None
    model.matcher.vision.queries([pixels])
    assert precisions == [products, "none"]
    assert torch.backends.cuda.matmul.fp32_precision == "none"


def test_what_is_known_gives_the_same_answers(
    model: Blip2, checkpoints: dict[str, Path], same_tower: Path, pictures: list[Image.Image]
) -> None:
    everything = ("generation", "retrieval", "patches")
    fresh = [asked(model, model.preprocess(picture)) for picture in pictures]
    assert model.recall("0", everything) is None
    for number, picture in enumerate(pictures):
        asked(model, model.preprocess(picture, digest=str(number), whole=True))
    reported: list[float] = []
    model.on_encode(lambda images, ms: reported.append(ms))
    with looks(model) as seen:
        for number, expected in enumerate(fresh):
            pixels = model.recall(str(number), everything)
            assert pixels is not None
            assert (pixels.generation, pixels.retrieval) == (None, None)
            same(asked(model, pixels), expected)
    assert (seen, reported) == ([], [])


def test_items_that_share_an_image_share_the_look(
    model: Blip2, pictures: list[Image.Image]
) -> None:
    params = resolve("caption", model.info, {"max_new_tokens": 6})
    order = [0, 1, 0, 2, 1, 0]
    prompts = ["", "a", "a photo of", "the", "", "is"]
    items = [
        GenerateItem(model.preprocess(pictures[n], digest=str(n)), (prompt,), params)
        for n, prompt in zip(order, prompts, strict=True)
    ]
    waited: list[tuple[int, float]] = []
    model.on_encode(lambda images, ms: waited.append((len(images), ms)))
    with looks(model) as seen:
        together = model.generate(items)
    assert seen == [3]
    assert [(count, ms > 0) for count, ms in waited] == [(6, True)], "all of them waited for it"
    alone = [
        model.generate([GenerateItem(model.preprocess(pictures[n]), (prompt,), params)])[0]
        for n, prompt in zip(order, prompts, strict=True)
    ]
    assert together == alone


def test_images_without_a_digest_are_not_mixed_up(
    model: Blip2, pictures: list[Image.Image]
) -> None:
    alone = [model.match([MatchItem(model.preprocess(each), TEXTS)])[0] for each in pictures]
    items = [MatchItem(model.preprocess(each), TEXTS) for each in pictures]
    for together, one in zip(model.match(items), alone, strict=True):
        assert together == pytest.approx(one, abs=1e-5)


def test_a_caption_alone_keeps_no_more_than_its_queries(
    model: Blip2, pictures: list[Image.Image]
) -> None:
    params = resolve("caption", model.info, {"max_new_tokens": 2})
    model.generate([GenerateItem(model.preprocess(pictures[0], digest="a"), ("",), params)])
    assert model.recall("a", ["generation"]) is not None
    assert model.recall("a", ["patches"]) is None
    assert model.recall("a", ["retrieval"]) is None


# --- one tower for both checkpoints ---------------------------------------------------------------


def test_a_shared_tower_gives_the_answers_of_two(
    model: Blip2,
    checkpoints: dict[str, Path],
    same_tower: Path,
    pictures: list[Image.Image],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert model.info.shares_vision
    assert model.matcher is not None
    assert model.matcher.model.vision_model is model.generator.model.vision_model
    monkeypatch.setattr("blipq_worker.blip2.model.equal_towers", lambda *_: False)
    apart = load(checkpoints, same_tower)
    assert not apart.info.shares_vision
    for picture in pictures:
        expected = asked(apart, apart.preprocess(picture))
        same(asked(model, model.preprocess(picture, whole=True)), expected)


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": "bfloat16"},
        {"quantization": "int8"},
        {"quantization": "nf4"},
        {"quantization": "nf4", "quantize_vision": True},
    ],
    ids=str,
)
def test_precision_does_not_keep_a_tower_from_being_shared(
    checkpoints: dict[str, Path],
    same_tower: Path,
    pictures: list[Image.Image],
    options: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Trap T9: what decides is what was loaded, not what lies in the files."""
    shared = load(checkpoints, same_tower, **options)
    assert shared.info.shares_vision
    monkeypatch.setattr("blipq_worker.blip2.model.equal_towers", lambda *_: False)
    apart = load(checkpoints, same_tower, **options)
    pixels = [each.preprocess(pictures[0], whole=True) for each in (shared, apart)]
    same(asked(shared, pixels[0]), asked(apart, pixels[1]))


def test_one_number_that_differs_keeps_the_towers_apart(
    checkpoints: dict[str, Path], tmp_path: Path, pictures: list[Image.Image]
) -> None:
    name = "vision_model.encoder.layers.1.mlp.fc2.bias"
    changed = load_file(checkpoints["opt"] / "model.safetensors")[name].clone()
    changed[3] += 0.001
    model = load(checkpoints, with_tower_of(checkpoints["opt"], tmp_path, **{name: changed}))
    assert not model.info.shares_vision
    with looks(model) as seen:
        asked(model, model.preprocess(pictures[0], digest="a", whole=True))
    assert seen == [1, 1]


def test_towers_that_compute_otherwise_are_kept_apart(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    """Old configurations have another epsilon in the blocks' LayerNorms: the weights are equal."""
    folder = with_tower_of(checkpoints["opt"], tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"]["layer_norm_eps"] = 1e-5
    (folder / "config.json").write_text(json.dumps(config))
    assert not load(checkpoints, folder).info.shares_vision


def test_towers_that_see_other_pixels_are_kept_apart(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    folder = with_tower_of(checkpoints["opt"], tmp_path)
    config = json.loads((folder / "processor_config.json").read_text())
    config["image_processor"]["image_mean"] = [0.5, 0.5, 0.5]
    (folder / "processor_config.json").write_text(json.dumps(config))
    assert not load(checkpoints, folder).info.shares_vision


def test_models_of_one_cache_do_not_take_each_others_features(
    checkpoints: dict[str, Path], same_tower: Path, pictures: list[Image.Image]
) -> None:
    cache = FeatureCache(2**20)
    first = load(checkpoints, same_tower, cache=cache)
    second = load(checkpoints, checkpoints["itm"], cache=cache)
    expected = asked(second, second.preprocess(pictures[0]))
    asked(first, first.preprocess(pictures[0], digest="a", whole=True))
    same(asked(second, second.preprocess(pictures[0], digest="a", whole=True)), expected)


# --- the cache ------------------------------------------------------------------------------------


def numbers(count: int) -> torch.Tensor:
    return torch.zeros(count, dtype=torch.float32)


def test_the_least_recently_used_go_first() -> None:
    cache = FeatureCache(100)
    for name in "abc":
        cache.put(name, "queries", numbers(8))  # 32 bytes
    cache.get("a", "queries")
    cache.put("d", "queries", numbers(8))
    assert [name for name in "abcd" if cache.get(name, "queries") is not None] == ["a", "c", "d"]
    assert cache.bytes == 96


def test_what_is_larger_than_the_cache_is_not_kept() -> None:
    cache = FeatureCache(100)
    cache.put("a", "queries", numbers(8))
    cache.put("b", "tower", numbers(26))
    assert (len(cache), cache.bytes) == (1, 32)


def test_an_image_is_forgotten_with_all_its_features_and_no_other_is() -> None:
    cache = FeatureCache(100)
    held = numbers(26)  # too large to be kept, and found while it is held
    cache.put("a", "tower", held)
    cache.put("a", "queries", numbers(8))
    cache.put("b", "queries", numbers(8))
    cache.forget({"a", "never seen"})
    assert (cache.get("a", "tower"), cache.get("a", "queries")) == (None, None)
    assert cache.get("b", "queries") is not None
    assert (len(cache), cache.bytes) == (1, 32)


def test_what_is_put_twice_counts_once() -> None:
    cache = FeatureCache(100)
    cache.put("a", "queries", numbers(8))
    cache.put("a", "queries", numbers(8))
    assert (len(cache), cache.bytes) == (1, 32)


def test_the_cache_holds_copies_of_its_own(model: Blip2, pictures: list[Image.Image]) -> None:
    """A row that is a view would keep the whole batch's memory, and the count would be wrong."""
    pixels = [model.preprocess(each, digest=str(n), whole=True) for n, each in enumerate(pictures)]
    model.match([MatchItem(each, TEXTS) for each in pixels])
    cache = model._cache
    assert cache is not None
    kept = [tensor.untyped_storage().nbytes() for tensor in cache._tensors.values()]
    assert sum(kept) == cache.bytes > 0
