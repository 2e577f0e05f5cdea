"""What a checkpoint is, and what is said when it is not there."""

import hashlib
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import Blip2Config

from blipq_worker.blip2 import Blip2, CheckpointError, GenerateItem
from blipq_worker.blip2.loading import checkpoints as module
from blipq_worker.blip2.loading.checkpoints import open_checkpoint
from blipq_worker.blip2.loading.oddities import oddities
from blipq_worker.catalog.params import resolve
from blipq_worker.catalog.weights import INDEX, WHOLE


def changed_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def shards(folder: Path) -> None:
    """Splits a checkpoint's weights in two, as save_pretrained does with large ones."""
    stored = load_file(folder / WHOLE)
    names = sorted(stored)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-{number:05}-of-00002.safetensors"
        save_file({name: stored[name] for name in part}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / WHOLE).unlink()


def said(model: Blip2, pictures: list[Image.Image]) -> list[str]:
    params = resolve("caption", model.info, {"num_beams": 1, "max_new_tokens": 8})
    items = [GenerateItem(model.preprocess(each), ("",), params) for each in pictures]
    return [texts[0][0].text for texts in model.generate(items)]


@pytest.fixture
def copy(checkpoints: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the OPT checkpoint that a test may damage."""
    return Path(shutil.copytree(checkpoints["opt"], tmp_path / "copy"))


@pytest.mark.parametrize(("name", "family"), [("opt", "opt"), ("t5", "t5"), ("itm", "retrieval")])
def test_the_family_is_read_from_the_configuration(
    checkpoints: dict[str, Path], name: str, family: str
) -> None:
    checkpoint = open_checkpoint(str(checkpoints[name]))
    assert (checkpoint.family, checkpoint.image_size) == (family, 28)
    assert checkpoint.num_query_tokens == 32


def test_the_revision_of_a_folder_is_the_digest_of_its_weights(copy: Path) -> None:
    weights = (copy / "model.safetensors").read_bytes()
    assert open_checkpoint(str(copy)).revision == hashlib.sha256(weights).hexdigest()


def test_the_revision_of_sharded_weights_depends_on_every_shard(copy: Path) -> None:
    shards(copy)
    first = open_checkpoint(str(copy)).revision
    with (copy / "model-00002-of-00002.safetensors").open("ab") as file:
        file.write(b"more")
    assert open_checkpoint(str(copy)).revision != first


def test_weights_in_shards_are_those_of_one_file(
    copy: Path, opt: Blip2, pictures: list[Image.Image]
) -> None:
    shards(copy)
    model = Blip2.load(str(copy), dtype="float32")
    assert said(model, pictures) == said(opt, pictures)


@pytest.mark.parametrize("name", ["a_backup.safetensors", "zz_older.safetensors"])
@pytest.mark.parametrize("sharded", [False, True])
def test_weights_that_lie_beside_a_checkpoint_change_nothing(
    copy: Path,
    opt: Blip2,
    pictures: list[Image.Image],
    caplog: pytest.LogCaptureFixture,
    name: str,
    sharded: bool,
) -> None:
    """Another model's weights, under the same names: whatever sorts last was served once."""
    stored = load_file(copy / WHOLE)
    revision = open_checkpoint(str(copy)).revision
    if sharded:
        shards(copy)
        revision = open_checkpoint(str(copy)).revision
    save_file({key: value.flip(0).contiguous() for key, value in stored.items()}, copy / name)
    with caplog.at_level(logging.WARNING):
        model = Blip2.load(str(copy), dtype="float32")
    assert said(model, pictures) == said(opt, pictures)
    assert model.info.revision == revision
    assert f"{name} is not read, but model" in caplog.text


def test_an_index_says_which_file_a_tensor_comes_from(
    copy: Path, opt: Blip2, pictures: list[Image.Image]
) -> None:
    """A shard that has other tensors too, say after it was written again."""
    shards(copy)
    second = copy / "model-00002-of-00002.safetensors"
    first = load_file(copy / "model-00001-of-00002.safetensors")
    stale = {key: value.flip(0).contiguous() for key, value in first.items()}
    save_file(stale | load_file(second), second, metadata={"format": "pt"})
    assert said(Blip2.load(str(copy), dtype="float32"), pictures) == said(opt, pictures)


def test_one_file_goes_before_an_index_as_transformers_has_it(copy: Path) -> None:
    (copy / INDEX).write_text("{}")
    assert [file.name for file in open_checkpoint(str(copy)).weights] == [WHOLE]


@pytest.mark.parametrize(
    ("index", "told"),
    [
        (b"", "is unusable: JSONDecodeError"),
        (b"\xef\xbb\xbf{}", "is unusable: JSONDecodeError"),
        (b"\xff", "is unusable: UnicodeDecodeError"),
        (b"[]", "is unusable: TypeError"),
        (b"{}", "is unusable: KeyError"),
        (b'{"weight_map": {}}', "must name files beside it"),
        (b'{"weight_map": {"a": 1}}', "must name files beside it"),
        (b'{"weight_map": {"a": "../other/model.safetensors"}}', "must name files beside it"),
        (b'{"weight_map": {"a": "gone.safetensors"}}', "lacks weights.*gone"),
    ],
)
def test_an_index_that_cannot_be_followed_is_told(copy: Path, index: bytes, told: str) -> None:
    (copy / WHOLE).unlink()
    (copy / INDEX).write_bytes(index)
    with pytest.raises(CheckpointError, match=told):
        open_checkpoint(str(copy))


def test_an_index_that_names_a_tensor_in_the_wrong_file_is_told(copy: Path) -> None:
    shards(copy)
    index = json.loads((copy / INDEX).read_text())
    swapped = dict.fromkeys(index["weight_map"], "model-00001-of-00002.safetensors")
    (copy / INDEX).write_text(json.dumps({"weight_map": swapped}))
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        Blip2.load(str(copy), dtype="float32")


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("checkpoint_best.pth", r"checkpoint_best\.pth is in LAVIS's format"),
        ("pytorch_model.bin", r"pytorch_model\.bin is pickled"),
        ("model-00001-of-00002.safetensors", "bring the index of several"),
        ("mine.safetensors", "rename a single file"),
    ],
)
def test_weights_that_are_not_served_are_named_as_what_they_are(
    copy: Path, name: str, told: str
) -> None:
    (copy / WHOLE).rename(copy / name)
    with pytest.raises(CheckpointError, match=told):
        open_checkpoint(str(copy))


@pytest.mark.parametrize("name", ["lavis.pth", "model.safetensors"])
def test_a_file_where_a_folder_is_expected_is_told(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"weights")
    with pytest.raises(CheckpointError, match=rf"{name} is a file: name a checkpoint's folder"):
        open_checkpoint(str(tmp_path / name))


@pytest.mark.parametrize("beside_its_base", [True, False])
def test_a_lora_adapter_is_told_and_not_left_out(copy: Path, beside_its_base: bool) -> None:
    """Served without it, the base model would answer in its place."""
    if not beside_its_base:
        for file in copy.iterdir():
            file.unlink()
    (copy / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (copy / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"LoRA adapter .*merge_and_unload"):
        open_checkpoint(str(copy))


def test_a_pointer_of_git_lfs_is_told(copy: Path) -> None:
    (copy / WHOLE).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(CheckpointError, match="git lfs pull"):
        open_checkpoint(str(copy))


def test_weights_that_no_part_takes_are_named(copy: Path, caplog: pytest.LogCaptureFixture) -> None:
    stored = load_file(copy / WHOLE)
    extra = {"language_model.extra": stored["query_tokens"].clone()}
    save_file(stored | extra, copy / WHOLE, metadata={"format": "pt"})
    with caplog.at_level(logging.WARNING):
        Blip2.load(str(copy), dtype="float32")
    assert "has 1 weights that no part of the model takes, such as language_model.extra" in (
        caplog.text
    )


def test_weights_under_other_names_are_told_with_both(copy: Path) -> None:
    stored = load_file(copy / WHOLE)
    renamed = {f"module.{name}": value for name, value in stored.items()}
    save_file(renamed, copy / WHOLE, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks weights.*has others, such as module\."):
        Blip2.load(str(copy), dtype="float32")


@pytest.mark.parametrize("quantization", ["none", "int8", "nf4"])
@pytest.mark.parametrize(
    "tensor", ["query_tokens", "language_model.model.decoder.layers.0.fc1.weight"]
)
def test_a_shape_that_is_not_the_configurations_is_told_with_both(
    copy: Path, capfd: pytest.CaptureFixture[str], tensor: str, quantization: Any
) -> None:
    stored = load_file(copy / WHOLE)
    expected = tuple(stored[tensor].shape)
    stored[tensor] = torch.cat([stored[tensor]] * 2, dim=-2)
    save_file(stored, copy / WHOLE, metadata={"format": "pt"})
    with pytest.raises(CheckpointError) as caught:
        Blip2.load(str(copy), dtype="float32", quantization=quantization)
    told = str(caught.value)
    assert f"{tensor} has the shape {tuple(stored[tensor].shape)}" in told
    assert f"config.json has {expected}" in told
    assert "MISMATCH" not in capfd.readouterr().err


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "tokenizer_config.json", "processor_config.json"]
)
@pytest.mark.parametrize(
    "content",
    [b"", b"\xef\xbb\xbf{}", b"\xff\xfe{\x00}\x00", b"{", b"[]", b"version https://git-lfs.git"],
    ids=["empty", "BOM", "UTF-16", "half", "list", "pointer"],
)
def test_a_file_that_cannot_be_read_is_named(copy: Path, name: str, content: bytes) -> None:
    (copy / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        Blip2.load(str(copy), dtype="float32")


def test_the_revision_of_a_hub_checkpoint_is_its_commit(
    checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = Path(shutil.copytree(checkpoints["opt"], tmp_path / "51572668da0eb669e01a"))
    asked: list[tuple[str, str | None]] = []

    def download(hub_id: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((hub_id, revision))
        return str(snapshot)

    monkeypatch.setattr(module, "snapshot_download", download)
    assert open_checkpoint("owner/blip2-coco@pinned").revision == snapshot.name
    assert asked == [("owner/blip2-coco", "pinned")]


@pytest.mark.parametrize(("suffix", "prompt"), [("-coco", "a photo of"), ("", "")])
def test_only_coco_checkpoints_have_a_default_prompt(copy: Path, suffix: str, prompt: str) -> None:
    renamed = copy.rename(copy.parent / f"blip2-opt{suffix}")
    assert open_checkpoint(str(renamed)).default_prompt == prompt
    assert open_checkpoint(f"{renamed}/").default_prompt == prompt


def test_a_fine_tune_that_sees_what_cocos_see_has_their_prompt(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    changed_config(copy, vision_config={**config["vision_config"], "image_size": 364})
    assert open_checkpoint(str(copy)).default_prompt == "a photo of"


def test_a_checkpoint_that_is_nowhere_says_how_to_fetch_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*args: Any, **kwargs: Any) -> str:
        raise LocalEntryNotFoundError("offline")

    monkeypatch.setattr(module, "snapshot_download", download)
    with pytest.raises(CheckpointError, match="hf download owner/absent") as caught:
        Blip2.load("owner/absent")
    assert "neither a folder here nor in the local cache" in str(caught.value)


@pytest.mark.parametrize("name", ["./no/such", "/no/such", "nothing", "a/b/c"])
def test_a_name_that_cannot_be_a_hub_id_is_not_looked_up(name: str) -> None:
    with pytest.raises(CheckpointError, match="neither a folder here nor a hub id") as caught:
        open_checkpoint(name)
    assert "models list" in str(caught.value), "it may be a known name with a mistake in it"


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_a_folder_without_its_files_names_what_is_missing(copy: Path, missing: str) -> None:
    (copy / missing).unlink()
    with pytest.raises(CheckpointError, match=missing.removeprefix("model")):
        open_checkpoint(str(copy))


def test_another_kind_of_model_is_refused(copy: Path) -> None:
    changed_config(copy, model_type="blip")
    with pytest.raises(CheckpointError):
        open_checkpoint(str(copy))


def test_a_missing_tokenizer_is_named(copy: Path) -> None:
    for file in copy.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(CheckpointError, match="no usable tokenizer"):
        Blip2.load(str(copy), dtype="float32")


def test_a_missing_image_processor_is_named(copy: Path) -> None:
    (copy / "processor_config.json").unlink()
    with pytest.raises(CheckpointError, match="no usable image processor"):
        Blip2.load(str(copy), dtype="float32")


def test_a_tokenizer_that_lost_its_first_token_is_refused(copy: Path) -> None:
    file = copy / "tokenizer.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "post_processor": None}))
    with pytest.raises(CheckpointError, match="does not put token 2 before every text"):
        Blip2.load(str(copy), dtype="float32")


def test_a_retrieval_tokenizer_that_lost_its_marks_is_refused(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(checkpoints["itm"], tmp_path / "itm"))
    file = folder / "tokenizer.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "post_processor": None}))
    with pytest.raises(CheckpointError, match=r"does not put \[CLS\] and \[SEP\] around texts"):
        Blip2.load(str(checkpoints["opt"]), str(folder), dtype="float32")


def test_each_checkpoint_is_used_for_its_own_kind(checkpoints: dict[str, Path]) -> None:
    with pytest.raises(CheckpointError, match="is a retrieval checkpoint"):
        Blip2.load(str(checkpoints["itm"]))
    with pytest.raises(CheckpointError, match="is not a retrieval checkpoint"):
        Blip2.load(str(checkpoints["opt"]), str(checkpoints["t5"]), dtype="float32")


@pytest.mark.parametrize(
    ("name", "part", "change", "told"),
    [
        ("opt", "vision_config", {"layer_norm_eps": 1e-5}, "vision_config.layer_norm_eps is 1e-05"),
        ("opt", "qformer_config", {"layer_norm_eps": 1e-6}, "where LAVIS computes with 1e-12"),
        ("t5", "text_config", {"layer_norm_epsilon": 1e-5}, "text_config.layer_norm_epsilon is"),
        ("opt", "vision_config", {"hidden_size": 1408, "image_size": 336}, "image_size is 336"),
    ],
)
def test_what_is_not_as_lavis_has_it_is_named(
    checkpoints: dict[str, Path],
    tmp_path: Path,
    name: str,
    part: str,
    change: dict[str, Any],
    told: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = Path(shutil.copytree(checkpoints[name], tmp_path / "copy"))
    open_checkpoint(str(folder))
    assert not caplog.records
    config = json.loads((folder / "config.json").read_text())
    changed_config(folder, **{part: config[part] | change})
    open_checkpoint(str(folder))
    (message,) = [record.getMessage() for record in caplog.records]
    assert told in message
    assert str(folder) in message


@pytest.mark.parametrize("side", [224, 364])
def test_what_is_as_lavis_has_it_is_not_named(side: int) -> None:
    config = Blip2Config()
    config.vision_config.image_size = side
    assert list(oddities(config)) == []
