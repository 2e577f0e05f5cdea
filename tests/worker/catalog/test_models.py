"""What a served model's name stands for."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from blipq_worker.blip2 import Blip2
from blipq_worker.catalog.models import (
    KNOWN_MODELS,
    VARIANTS,
    ModelError,
    demo_folder,
    served_model,
)
from blipq_worker.serving.loader import load_models
from blipq_worker.settings import WorkerSettings


def test_the_demo_model_comes_with_the_worker() -> None:
    served = served_model("default", "demo")
    assert served.generation == str(demo_folder() / "opt")
    assert served.retrieval == str(demo_folder() / "itm")


BLIP2 = [name for name in KNOWN_MODELS if not name.startswith("instructblip-")]
INSTRUCTBLIP = [name for name in KNOWN_MODELS if name.startswith("instructblip-")]


@pytest.mark.parametrize("name", BLIP2)
def test_a_known_model_brings_its_retrieval_checkpoint_along(name: str) -> None:
    served = served_model("default", name)
    assert served.generation == f"Salesforce/blip2-{name}"
    assert served.retrieval is not None
    assert served.retrieval.endswith("-coco") == name.endswith("-coco")


@pytest.mark.parametrize("name", BLIP2)
def test_a_known_models_checkpoints_see_the_same_pixels(name: str) -> None:
    known = KNOWN_MODELS[name]
    written, matched = VARIANTS[known.generation], VARIANTS[str(known.retrieval)]
    assert matched.family == "retrieval"
    assert written.family == ("t5" if "t5" in name else "opt")
    assert (written.image_size, written.coco) == (matched.image_size, matched.coco)
    assert written.default_prompt == ("a photo of" if name.endswith("-coco") else "")


@pytest.mark.parametrize("name", INSTRUCTBLIP)
def test_a_known_instructblip_is_served_alone(name: str) -> None:
    served = served_model("default", name)
    assert (served.generation, served.retrieval) == (f"Salesforce/{name}", None)
    variant = VARIANTS[served.generation]
    assert variant.instructed
    assert variant.family == ("t5" if "t5" in name else "llama")
    assert (variant.image_size, variant.default_prompt) == (224, "A short image description:")


def test_all_four_instructblips_are_known() -> None:
    assert len(INSTRUCTBLIP) == 4


def test_a_checkpoint_of_ones_own_is_one_or_two_folders() -> None:
    assert served_model("m", "/a").retrieval is None
    both = served_model("m", "/a+/b")
    assert (both.name, both.generation, both.retrieval) == ("m", "/a", "/b")


def test_a_plus_in_a_folders_name_is_escaped() -> None:
    one = served_model("m", r"/a\+b")
    assert (one.generation, one.retrieval) == ("/a+b", None)
    both = served_model("m", r"/a\+b+/c\+d")
    assert (both.generation, both.retrieval) == ("/a+b", "/c+d")


def test_folders_with_a_comma_and_a_plus_are_served(
    checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = (str(tmp_path / name) for name in ("lr=1,bs=2", "a+b"))
    shutil.copytree(checkpoints["opt"], one)
    shutil.copytree(checkpoints["itm"], two)
    written = f"{one}+{two}".replace("1,", r"1\,").replace("a+", r"a\+")
    monkeypatch.setenv("BLIPQ_MODELS", f"mine={written},demo")
    options = WorkerSettings(dtype="float32", canary=False)
    loaded = load_models(options)
    assert list(loaded) == ["mine", "demo"]
    assert loaded["mine"].info.has_retrieval


def test_whatever_keeps_a_model_from_being_loaded_is_told_in_one_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(*args: Any, **kwargs: Any) -> Blip2:
        raise KeyError("a library's\nsurprise")

    monkeypatch.setattr(Blip2, "load", broken)
    with pytest.raises(ModelError, match="model 'default' cannot be loaded: KeyError") as caught:
        load_models(WorkerSettings())
    assert "\n" not in str(caught.value)


def test_models_are_loaded_under_their_names(checkpoints: dict[str, Path]) -> None:
    what = f"{checkpoints['opt']}+{checkpoints['itm']}"
    loaded = load_models(WorkerSettings(models={"default": what}, device="cpu", dtype="float32"))
    assert list(loaded) == ["default"]
    assert loaded["default"].info.checkpoint == what
    assert loaded["default"].info.has_retrieval


def test_a_model_that_is_not_there_is_told(tmp_path: Path) -> None:
    options = WorkerSettings(models={"mine": str(tmp_path / "gone")}, device="cpu")
    with pytest.raises(ModelError, match="model 'mine'"):
        load_models(options)
