"""Adapters behind the engine: models by name, whose texts share the steps of one resident base."""

from collections.abc import Iterator

import pytest
from msgspec.structs import replace

from blipq_worker.blip2 import Blip2
from blipq_worker.catalog.adapters import read_adapter
from blipq_worker.engine.backend import Engine
from blipq_worker.images.preprocess import pixels_of
from blipq_worker.inference.local import LocalInference
from blipq_worker.inference.requests import (
    Answer,
    Generate,
    Generated,
    GenerationParams,
    ImagePixels,
    Match,
    Rank,
)
from worker.in_flight import DEMO
from worker.lora import OPT_LAYERS, RECIPE, pictures, random_adapter

GREEDY = GenerationParams(num_beams=1, max_new_tokens=12)
NAMES = ("default", "one", "two")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Blip2]:
    folder = tmp_path_factory.mktemp("adapters")
    folders = [
        random_adapter(folder / "one", DEMO, list(RECIPE)),
        random_adapter(folder / "two", DEMO, OPT_LAYERS, r=7),
    ]
    adapters = [read_adapter(str(each)) for each in folders]
    base = Blip2.load(str(DEMO), str(DEMO.parent / "itm"), dtype="float32", adapters=adapters)
    own = [
        replace(base.info, revision=f"{base.info.revision}+{each.digest()}") for each in adapters
    ]
    return {"default": base, "one": base.adapted(1, own[0]), "two": base.adapted(2, own[1])}


@pytest.fixture
def inference(models: dict[str, Blip2]) -> Iterator[LocalInference]:
    engine = Engine(models, max_batch_size=16, batch_wait_timeout_s=0.3, max_waiting=64)
    local = LocalInference(engine)
    engine.batcher.start()
    yield local
    engine.batcher.close(timeout=10)


def image(models: dict[str, Blip2], digest: str | None = None) -> ImagePixels:
    (picture,) = pictures(1)
    return ImagePixels(digest, pixels=pixels_of(picture, models["default"].info.recipes))


def texts_of(answer: Answer) -> str:
    assert isinstance(answer.value, Generated)
    return answer.value.texts[0][0].text


def test_texts_of_a_base_and_its_adapters_are_written_in_the_same_steps(
    models: dict[str, Blip2], inference: LocalInference
) -> None:
    wanted = Generate(image(models), ("a photo of",), GREEDY)
    alone = [inference.submit(name, wanted, "normal").result(timeout=60) for name in NAMES]
    futures = [inference.submit(name, wanted, "normal") for name in NAMES for _ in range(2)]
    together = [future.result(timeout=60) for future in futures]
    assert [texts_of(each) for each in together[::2]] == [texts_of(each) for each in alone]
    assert len({texts_of(each) for each in alone}) == 3
    assert max(each.batch_size for each in together) == 6


def test_equal_items_of_different_adapters_are_not_taken_for_one(
    models: dict[str, Blip2], inference: LocalInference
) -> None:
    wanted = Generate(image(models, "a" * 64), ("a photo of",), GREEDY)
    futures = [inference.submit(name, wanted, "normal") for name in NAMES]
    assert len({texts_of(future.result(timeout=60)) for future in futures}) == 3


def test_choices_and_matches_of_an_adapter_run_on_the_resident(
    models: dict[str, Blip2], inference: LocalInference
) -> None:
    ranked = Rank(image(models), ("a photo of",), ("a red circle", "a blue square"))
    matched = Match(image(models), ("a red circle",), "itm")
    wanted = [(name, item) for name in NAMES for item in (ranked, matched)]
    found = [inference.submit(*each, "normal") for each in wanted]
    values = [future.result(timeout=60).value for future in found]
    assert len({str(value) for value in values[::2]}) == 3
    assert len({str(value) for value in values[1::2]}) == 1


def test_fronts_see_adapters_as_models_with_revisions_of_their_own(
    models: dict[str, Blip2], inference: LocalInference
) -> None:
    infos = inference.models()
    assert list(infos) == list(NAMES)
    assert len({info.revision for info in infos.values()}) == 3
