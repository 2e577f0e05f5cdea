"""A checkpoint in S3 is the checkpoint that was in the folder, tensor by tensor."""

import gc
import hashlib
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from blipq.local.stack import LocalStack
from blipq.s3.storage import Storage
from blipq_worker.blip2 import Blip2, ExplainItem
from blipq_worker.blip2.loading.checkpoints import CheckpointError, open_checkpoint
from blipq_worker.blip2.loading.quantizing import Quantization, Quantizing
from blipq_worker.blip2.loading.weights import Setup, load_weights
from blipq_worker.catalog.models import ModelError, demo_folder
from blipq_worker.catalog.s3.errors import Fault, S3ModelError
from blipq_worker.catalog.s3.manifest import MANIFEST, Manifest
from blipq_worker.serving.footprint import config_of
from blipq_worker.serving.goldens import golden_beside, read_goldens, write_golden
from blipq_worker.serving.loader import checker, load_models
from blipq_worker.serving.pushing import push
from blipq_worker.settings import WorkerSettings
from worker.blip2.loading.test_checkpoints import said, shards
from worker.models_in_s3 import Bucket, reach

WEIGHTS = "model.safetensors"


@pytest.fixture
def bucket(stack: LocalStack, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    bucket = Bucket(stack)
    reach(bucket.settings, monkeypatch)
    return bucket


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary files go."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def in_small_blocks(bucket: Bucket, place: str) -> None:
    """Writes the manifest again as if blocks were small, so that tensors span several of them."""
    size = 8192
    manifest = Manifest.model_validate_json(bucket.read(f"{place}/{MANIFEST}"))
    files = {}
    for name, file in manifest.files.items():
        data = bucket.read(f"{place}/{name}")
        blocks = [data[at : at + size] for at in range(0, len(data), size)]
        digests = tuple(hashlib.sha256(each).hexdigest() for each in blocks)
        files[name] = file.model_copy(update={"blocks": digests})
    smaller = manifest.model_copy(update={"block_bytes": size, "files": files})
    bucket.write(f"{place}/{MANIFEST}", smaller.written())


def held(model: Any) -> dict[str, torch.Tensor]:
    """Every tensor that a loaded model keeps, quantized ones with their scales."""
    found = dict(model.state_dict())
    for name, weight in model.named_parameters():
        for about in ("SCB", "quant_state"):
            state = getattr(weight, about, None)
            scale = getattr(state, "absmax", state)
            if isinstance(scale, torch.Tensor):
                found[f"{name} {about}"] = scale
    return found


@pytest.mark.parametrize("quantization", ["none", "int8", "nf4"])
@pytest.mark.parametrize("name", ["opt", "t5", "itm"])
def test_the_tensors_are_those_that_come_from_a_folder_bit_by_bit(
    bucket: Bucket, checkpoints: dict[str, Path], name: str, quantization: Quantization
) -> None:
    place = bucket.place()
    push(checkpoints[name], place)
    in_small_blocks(bucket, place)
    dtype = "float32" if quantization == "none" else "bfloat16"
    setup = Setup(torch.device("cpu"), dtype=dtype, quantizing=Quantizing(quantization, True))
    expected = held(load_weights(open_checkpoint(str(checkpoints[name])), setup))
    checkpoint = open_checkpoint(place)
    found = held(load_weights(checkpoint, setup))
    checkpoint.close()
    assert found.keys() == expected.keys()
    for each in expected:
        assert found[each].dtype == expected[each].dtype, each
        assert torch.equal(found[each], expected[each]), each


@pytest.mark.parametrize("sharded", [False, True])
def test_a_model_from_s3_says_what_the_one_from_the_folder_says(
    bucket: Bucket,
    checkpoints: dict[str, Path],
    opt: Blip2,
    pictures: list[Image.Image],
    tmp_path: Path,
    temporary: Path,
    sharded: bool,
) -> None:
    folder = Path(shutil.copytree(checkpoints["opt"], tmp_path / "copy"))
    if sharded:
        shards(folder)
    place, other = bucket.place(), bucket.place()
    served = push(folder, place)
    push(checkpoints["itm"], other)
    model = Blip2.load(served, other, dtype="float32")
    assert said(model, pictures) == said(opt, pictures)
    assert model.info.revision == open_checkpoint(str(folder)).revision == served.partition("@")[2]
    assert model.info.retrieval_revision == opt.info.retrieval_revision
    assert not list(temporary.iterdir())


@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_a_model_in_s3_says_where_it_looked_as_its_folder_does(
    bucket: Bucket,
    checkpoints: dict[str, Path],
    pictures: list[Image.Image],
    quantization: Quantization,
) -> None:
    place, other = bucket.place(), bucket.place()
    push(checkpoints["opt"], place)
    push(checkpoints["itm"], other)
    load: dict[str, Any] = {
        "dtype": "float32" if quantization == "none" else "bfloat16",
        "quantization": quantization,
        "quantize_vision": quantization != "none",
    }
    drawn = []
    for names in ((str(checkpoints["opt"]), str(checkpoints["itm"])), (place, other)):
        model = Blip2.load(*names, **load)
        item = ExplainItem(model.preprocess(pictures[0]), ("a red circle", "two cats"))
        drawn.append(model.explain([item])[0])
    expected, found = drawn
    assert found.keys() == expected.keys()
    for name, maps in expected.items():
        np.testing.assert_allclose(found[name], maps, atol=1e-5)


def test_a_loaded_model_keeps_no_way_to_s3(
    bucket: Bucket, checkpoints: dict[str, Path], pictures: list[Image.Image]
) -> None:
    place = bucket.place()
    push(checkpoints["opt"], place)
    gc.collect()
    before = [each for each in gc.get_objects() if type(each) is Storage]
    model = Blip2.load(place, dtype="float32")
    gc.collect()
    after = [each for each in gc.get_objects() if type(each) is Storage]
    assert len(after) == len(before)
    assert said(model, pictures)


def test_damaged_weights_are_refused_and_leave_nothing_behind(
    bucket: Bucket, checkpoints: dict[str, Path], temporary: Path
) -> None:
    place = bucket.place()
    push(checkpoints["opt"], place)
    size = (checkpoints["opt"] / WEIGHTS).stat().st_size
    bucket.damage(f"{place}/{WEIGHTS}", at=size - 3)
    with pytest.raises(S3ModelError, match="are not those that were pushed") as caught:
        Blip2.load(place, dtype="float32")
    assert caught.value.code is Fault.DAMAGED
    assert not list(temporary.iterdir())


def test_a_damaged_tokenizer_is_refused_and_leaves_nothing_behind(
    bucket: Bucket, checkpoints: dict[str, Path], temporary: Path
) -> None:
    place = bucket.place()
    push(checkpoints["opt"], place)
    bucket.damage(f"{place}/tokenizer.json", at=100)
    with pytest.raises(S3ModelError, match=r"tokenizer\.json holds other bytes"):
        open_checkpoint(place)
    assert not list(temporary.iterdir())


def test_what_is_wrong_with_a_pushed_checkpoint_is_told_as_of_a_folder(
    bucket: Bucket, checkpoints: dict[str, Path], tmp_path: Path, temporary: Path
) -> None:
    folder = Path(shutil.copytree(checkpoints["opt"], tmp_path / "copy"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "blip"}))
    place = bucket.place()
    push(folder, place)
    with pytest.raises(CheckpointError, match="not BLIP-2 or InstructBLIP"):
        open_checkpoint(place)
    assert not list(temporary.iterdir())


def test_memory_is_counted_by_the_configuration_in_s3(
    bucket: Bucket, checkpoints: dict[str, Path]
) -> None:
    place = bucket.place()
    push(checkpoints["opt"], place)
    expected = config_of(str(checkpoints["opt"]))
    assert config_of(place).to_dict().keys() == expected.to_dict().keys()
    assert config_of(place).text_config.hidden_size == expected.text_config.hidden_size


@pytest.mark.parametrize("right", [True, False])
def test_a_golden_that_was_pushed_with_a_checkpoint_is_what_its_model_is_held_to(
    bucket: Bucket, tmp_path: Path, right: bool
) -> None:
    folder = Path(shutil.copytree(demo_folder() / "opt", tmp_path / "mine"))
    golden = read_goldens()["demo"]
    if not right:
        said = golden.said.model_copy(update={"captions": ("three green stars",) * 2})
        golden = golden.model_copy(update={"said": said})
    write_golden(folder / "goldens.json", "where it was recorded", golden)
    place = bucket.place()
    push(folder, place)
    options = WorkerSettings(models={"default": place}, dtype="float32")
    if right:
        models = load_models(options)
        check = checker(options, models)
        assert check is not None
        check("default")
    else:
        with pytest.raises(ModelError, match="its texts should be 'three green stars'"):
            load_models(options)


def test_several_goldens_of_other_names_hold_a_checkpoint_to_none_and_a_warning_says_so(
    bucket: Bucket, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = Path(shutil.copytree(demo_folder() / "opt", tmp_path / "mine"))
    for name in ("one", "another"):
        write_golden(folder / "goldens.json", name, read_goldens()["demo"])
    place = bucket.place()
    push(folder, place)
    assert golden_beside(place, place) is None
    assert f"{place} is held to no golden: {place}/goldens.json" in caplog.text
    assert "another, one" in caplog.text
    caplog.clear()
    assert golden_beside(place, "one") is not None
    assert not caplog.text


@pytest.mark.parametrize("canary", [True, False])
def test_the_error_of_a_worker_begins_with_its_stable_code(bucket: Bucket, canary: bool) -> None:
    options = WorkerSettings(models={"default": bucket.place()}, dtype="float32", canary=canary)
    with pytest.raises(S3ModelError, match=r"^checkpoint_missing: ") as caught:
        load_models(options)
    assert caught.value.code is Fault.MISSING


def test_a_model_that_is_damaged_is_named_behind_its_code(
    bucket: Bucket, checkpoints: dict[str, Path]
) -> None:
    place = bucket.place()
    push(checkpoints["opt"], place)
    bucket.damage(f"{place}/{WEIGHTS}", at=(checkpoints["opt"] / WEIGHTS).stat().st_size - 3)
    options = WorkerSettings(models={"mine": place}, dtype="float32", canary=False)
    with pytest.raises(S3ModelError, match=r"^checkpoint_damaged: model 'mine': .*are not those"):
        load_models(options)


@pytest.mark.parametrize("name", ["t5", "llama"])
def test_an_instructblip_from_s3_brings_the_tokenizer_of_its_qformer(
    bucket: Bucket,
    instructed_checkpoints: dict[str, Path],
    pictures: list[Image.Image],
    temporary: Path,
    name: str,
) -> None:
    place, folder = bucket.place(), instructed_checkpoints[name]
    push(folder, place)
    assert "qformer_tokenizer/tokenizer.json" in bucket.keys(place)
    model, own = (Blip2.load(each, dtype="float32") for each in (place, str(folder)))
    assert said(model, pictures) == said(own, pictures)
    assert model.info.revision == own.info.revision
    assert not list(temporary.iterdir())
