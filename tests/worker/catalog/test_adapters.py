"""What an adapter's folder holds, and what is refused of it before any weight is loaded."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig
from safetensors.torch import load_file, save_file

from blipq_worker.blip2 import Blip2
from blipq_worker.catalog.adapters import AdapterError, describe_all, read_adapter
from worker.in_flight import DEMO, T5_TWIN
from worker.lora import OPT_LAYERS, QFORMER, RECIPE, random_adapter

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_adapter(tmp_path_factory.mktemp("adapter") / "one", DEMO, list(RECIPE), r=8)


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def change(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | fields))


def rewrite(folder: Path, of: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    save_file(of(load_file(folder / WEIGHTS)), folder / WEIGHTS)


def test_ranks_scales_and_what_it_touches_are_read_without_its_numbers(tmp_path: Path) -> None:
    both = f"{OPT_LAYERS}|{QFORMER}"
    options = {"rank_pattern": {r"fc\d": 3}, "alpha_pattern": {"q_proj": 48}, "use_rslora": True}
    found = read_adapter(str(random_adapter(tmp_path, DEMO, both, r=9, lora_alpha=6, **options)))
    layers = "language_model.model.decoder.layers.1."
    assert found.targets[f"{layers}self_attn.q_proj"] == (9, 128, 128, 48 / 3)
    assert found.targets[f"{layers}self_attn.v_proj"] == (9, 128, 128, 6 / 3)
    assert found.targets[f"{layers}fc1"] == (3, 128, 384, 6 / 3**0.5)
    assert found.rank == 9
    assert found.changes_queries
    stored = load_file(tmp_path / WEIGHTS)
    assert found.parameters == sum(each.numel() for each in stored.values())


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"target_modules": list(RECIPE), "use_dora": True}, r"DoRA \(use_dora\)"),
        ({"target_modules": list(RECIPE), "modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"target_modules": ["fc1", "fc2"]}, r"vision tower \(vision_model"),
        ({"target_modules": ["language_projection"]}, "changes language_projection"),
        ({"target_modules": ["dense"]}, "changes qformer.*query, key and value of the Q-Former"),
        ({"target_modules": ["q_proj"], "r": 65}, "rank 65 .*at most 64"),
        ({"target_modules": ["q_proj"], "bias": "lora_only"}, r"biases \(bias\)"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "holds .*embed_tokens"),
    ],
)
def test_what_is_not_served_is_refused_by_its_name(
    tmp_path: Path, options: dict[str, Any], reason: str
) -> None:
    others = {name: each for name, each in options.items() if name != "target_modules"}
    folder = random_adapter(tmp_path, DEMO, options["target_modules"], **others)
    with pytest.raises(AdapterError, match=f"^adapter_unsupported: .*{reason}"):
        read_adapter(str(folder))


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        (PrefixTuningConfig(num_virtual_tokens=4).to_dict(), "'PREFIX_TUNING': LoRA is served"),
        ({"init_lora_weights": "pissa_niter_4"}, "changes to its base"),
        ({"lora_bias": True}, r"biases \(lora_bias\)"),
        ({"use_qalora": True}, "QALoRA"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
    ],
)
def test_what_only_the_configuration_shows_is_refused_too(
    folder: Path, fields: dict[str, Any], reason: str
) -> None:
    change(folder, **json.loads(json.dumps(fields, default=str)))
    with pytest.raises(AdapterError, match=f"^adapter_unsupported: .*{reason}"):
        read_adapter(str(folder))


def test_a_new_configuration_has_no_field_that_changes_numbers_and_nobody_knows() -> None:
    """Of the peft that is here: what its defaults are is what is served."""
    known = LoraConfig(target_modules=["q_proj"]).to_dict()
    for field in (
        "use_dora",
        "modules_to_save",
        "lora_bias",
        "fan_in_fan_out",
        "layer_replication",
    ):
        assert field in known
        assert not known[field]


def _without_config(folder: Path) -> None:
    (folder / CONFIG).unlink()


def _broken_config(folder: Path) -> None:
    (folder / CONFIG).write_text("{")


def _list_config(folder: Path) -> None:
    (folder / CONFIG).write_text("[]")


def _pickled(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")


def _cut(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:200])


def _pointer(folder: Path) -> None:
    (folder / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")


def _half(folder: Path) -> None:
    rewrite(folder, lambda all_: {name: each for name, each in all_.items() if "lora_A" in name})


def _empty(folder: Path) -> None:
    rewrite(folder, lambda all_: {})


def _whole_numbers(folder: Path) -> None:
    rewrite(folder, lambda all_: {name: each.to(torch.int8) for name, each in all_.items()})


def _other_ranks(folder: Path) -> None:
    rewrite(
        folder, lambda all_: {n: each[:5] if "lora_A" in n else each for n, each in all_.items()}
    )


def _no_alpha(folder: Path) -> None:
    change(folder, lora_alpha=None)


def _bad_pattern(folder: Path) -> None:
    change(folder, alpha_pattern={"(": 3})


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (_without_config, "has no adapter_config.json"),
        (_broken_config, "adapter_config.json is unreadable"),
        (_list_config, "holds no JSON object"),
        (_pickled, "adapter_model.bin, a pickle, which is not loaded"),
        (_cut, "is unreadable"),
        (_pointer, "git lfs pull"),
        (_half, "one of two matrices"),
        (_empty, "holds no tensors"),
        (_whole_numbers, "no matrix of floats"),
        (_other_ranks, "the ranks 5 and 8"),
        (_no_alpha, "no usable lora_alpha"),
        (_bad_pattern, "no usable lora_alpha"),
    ],
)
def test_what_cannot_be_read_is_explained_in_one_line(
    folder: Path, damage: Callable[[Path], None], reason: str
) -> None:
    damage(folder)
    with pytest.raises(AdapterError, match=f"^adapter_unreadable: .*{reason}") as raised:
        read_adapter(str(folder))
    assert "\n" not in str(raised.value)
    (line,) = describe_all({"shop": ("default", str(folder))})
    assert line.problem == str(raised.value)


def test_a_base_that_it_does_not_fit_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"^adapter_misfit: .*its base does not have"):
        Blip2.load(str(T5_TWIN), dtype="float32", adapters=[read_adapter(str(folder))])
    rewrite(
        folder,
        lambda all_: {n: each.repeat(1, 2) if "A" in n else each for n, each in all_.items()},
    )
    with pytest.raises(
        AdapterError, match=r"^adapter_misfit: .*from 256 .*from 128 .*another model"
    ):
        Blip2.load(str(DEMO), dtype="float32", adapters=[read_adapter(str(folder))])


def test_an_adapter_of_another_published_checkpoint_is_refused(folder: Path) -> None:
    change(folder, base_model_name_or_path="Salesforce/blip2-opt-2.7b")
    adapter = read_adapter(str(folder))
    adapter.require_base("Salesforce/blip2-opt-2.7b@main")
    adapter.require_base("/a/folder/of/ours")
    with pytest.raises(AdapterError, match=r"^adapter_misfit: .*trained on .*opt-2.7b, .*coco"):
        adapter.require_base("Salesforce/blip2-opt-2.7b-coco")


def test_numbers_that_are_not_finite_are_refused(folder: Path) -> None:
    rewrite(folder, lambda all_: {name: each * float("inf") for name, each in all_.items()})
    with pytest.raises(AdapterError, match=r"^adapter_unreadable: .*not finite"):
        Blip2.load(str(DEMO), dtype="float32", adapters=[read_adapter(str(folder))])


def test_adapters_are_not_compiled(folder: Path) -> None:
    with pytest.raises(AdapterError, match=r"^adapter_unsupported: BLIPQ_COMPILE"):
        Blip2.load(str(DEMO), compiled=True, adapters=[read_adapter(str(folder))])
