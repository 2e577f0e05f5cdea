"""What a checkpoint is, and what is said when it is not there."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from blipq_worker.blip2 import Blip2, CheckpointError
from blipq_worker.blip2 import checkpoints as module
from blipq_worker.blip2.checkpoints import open_checkpoint


def changed_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


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
    (copy / "model-2.safetensors").write_bytes(b"one")
    first = open_checkpoint(str(copy)).revision
    (copy / "model-2.safetensors").write_bytes(b"two")
    assert open_checkpoint(str(copy)).revision != first


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
    with pytest.raises(CheckpointError, match="neither a folder here nor a hub id"):
        open_checkpoint(name)


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_a_folder_without_its_files_names_what_is_missing(copy: Path, missing: str) -> None:
    (copy / missing).unlink()
    with pytest.raises(CheckpointError, match=missing.removeprefix("model")):
        open_checkpoint(str(copy))


def test_another_kind_of_model_is_refused(copy: Path) -> None:
    changed_config(copy, model_type="instructblip")
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
