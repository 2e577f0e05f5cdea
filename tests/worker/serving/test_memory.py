"""The counted memory, against what really gets loaded; and what is said of missing weights."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    Blip2ForConditionalGeneration,
    Blip2ForImageTextRetrieval,
    InstructBlipForConditionalGeneration,
)

from blipq_worker.blip2.heads.heatmaps import read_plain
from blipq_worker.blip2.loading.checkpoints import open_checkpoint
from blipq_worker.blip2.loading.precision import choose_precision
from blipq_worker.blip2.loading.quantizing import Quantizing
from blipq_worker.blip2.loading.weights import Setup, load_weights
from blipq_worker.catalog import weights
from blipq_worker.catalog.models import KNOWN_MODELS, PARAMETERS, ModelError, demo_folder
from blipq_worker.catalog.weights import how_to_get, weights_of
from blipq_worker.serving import loader as load
from blipq_worker.serving import memory
from blipq_worker.serving.footprint import (
    GIB,
    Load,
    Memory,
    config_of,
    loaded_bytes,
    memory_of,
    parts_of,
)
from blipq_worker.serving.loader import load_models
from blipq_worker.serving.memory import Gpu
from blipq_worker.serving.sizes import sizes_of
from blipq_worker.settings import WorkerSettings
from conftest import ROOT

PAGE = ROOT / "docs" / "blip2.md"
INSTRUCTED_PAGE = ROOT / "docs" / "instructblip.md"
VICUNA = "Salesforce/instructblip-vicuna-7b"
LAYERS = {"nf4": "Linear4bit", "int8": "Linear8bitLt"}


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "blipq", "models", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        timeout=90,
    )


@pytest.fixture
def tiny(checkpoints: dict[str, Path], instructed_checkpoints: dict[str, Path]) -> dict[str, Path]:
    """Folders of BLIP-2s and InstructBLIPs."""
    instructed = {f"instructed_{name}": each for name, each in instructed_checkpoints.items()}
    return {**checkpoints, **instructed}


def loaded(folder: Path, quantizing: Quantizing = Quantizing()) -> Any:  # noqa: B008
    setup = Setup(torch.device("cpu"), "bfloat16", quantizing)
    return load_weights(open_checkpoint(str(folder)), setup)


@pytest.mark.parametrize("name", ["opt", "t5", "itm", "instructed_t5", "instructed_llama"])
def test_weights_are_counted_as_they_are_loaded(tiny: dict[str, Path], name: str) -> None:
    retrieval = name == "itm"
    counted = parts_of(
        config_of(str(tiny[name]), retrieval=retrieval),
        choose_precision("bfloat16", torch.device("cpu"), "opt"),
        Quantizing(),
        retrieval=retrieval,
    )
    assert sum(part.bytes for part in counted) == sum(
        weight.nbytes for weight in loaded(tiny[name]).parameters()
    )


@pytest.mark.parametrize("vision", [False, True])
@pytest.mark.parametrize("quantization", ["nf4", "int8"])
@pytest.mark.parametrize("name", ["opt", "t5", "instructed_t5", "instructed_llama"])
def test_the_same_layers_are_counted_as_quantized_that_are(
    tiny: dict[str, Path], name: str, quantization: Any, vision: bool
) -> None:
    quantizing = Quantizing(quantization, vision)
    opened = loaded(tiny[name], quantizing)
    quantized = {
        place
        for place, module in opened.named_modules()
        if type(module).__name__ == LAYERS[quantization]
    }
    config = config_of(str(tiny[name]))
    blank = blank_model(config, retrieval=False)
    weights = [blank.get_submodule(place).weight for place in quantized]
    parts = ("language model", *(["vision tower"] if vision else []))
    sizes = [size for size in sizes_of(config) if size.part in parts]
    assert sum(size.linear for size in sizes) == sum(each.numel() for each in weights)
    assert sum(size.rows for size in sizes) == sum(len(each) for each in weights)
    precision = choose_precision("bfloat16", torch.device("cpu"), "opt")
    counted = sum(part.bytes for part in parts_of(config, precision, quantizing))
    # Buffers and the smallest layers' rounded-up blocks are not counted: nothing in a real model.
    assert counted == pytest.approx(loaded_bytes(opened), rel=0.03)


PARTS = {
    "vision_model": "vision tower",
    "language_projection": "projection",
    "language_model": "language model",
    "itm_head": "heads",
    "vision_projection": "heads",
    "text_projection": "heads",
}


def blank_model(config: Any, *, retrieval: bool) -> Any:
    """The model of a configuration as transformers has it, without numbers."""
    kind: Any = Blip2ForImageTextRetrieval if retrieval else Blip2ForConditionalGeneration
    if config.model_type == "instructblip":
        kind = InstructBlipForConditionalGeneration
    with torch.device("meta"):
        return kind(config)


@pytest.mark.parametrize(
    ("checkpoint", "changed"),
    [
        *((name, {}) for name in (*PARAMETERS, "demo/opt", "demo/itm", "tests/models/t5")),
        ("demo/opt", {"word_embed_proj_dim": 8, "enable_bias": False}),
        ("demo/opt", {"do_layer_norm_before": False, "tie_word_embeddings": False}),
        ("tests/models/t5", {"num_decoder_layers": 1, "is_gated_act": False, "d_kv": 3}),
        (VICUNA, {"num_key_value_heads": 8, "head_dim": 64, "tie_word_embeddings": True}),
        (VICUNA, {"attention_bias": True, "mlp_bias": True}),
    ],
)
def test_weights_are_counted_as_transformers_makes_them(
    checkpoint: str, changed: dict[str, Any]
) -> None:
    retrieval = "itm" in checkpoint
    folder = checkpoint.replace("demo", str(demo_folder())).replace("tests", str(ROOT / "tests"))
    config = config_of(folder, retrieval=retrieval)
    for name, value in changed.items():
        setattr(config.text_config, name, value)
    model = blank_model(config, retrieval=retrieval)
    counted: Counter[str] = Counter()
    for name, weight in model.named_parameters():
        counted[PARTS.get(name.partition(".")[0], "q-former")] += weight.numel()
    if not getattr(config.text_config, "scale_decoder_outputs", True):
        counted["language model"] += model.language_model.lm_head.weight.numel()
    sizes = sizes_of(config, retrieval=retrieval)
    assert {size.part: size.rest + size.linear for size in sizes} == counted


def test_memory_is_counted_without_transformers_models() -> None:
    """They take seconds to import."""
    code = """
import sys
from blipq_worker.serving.footprint import memory_of
memory_of("opt-2.7b", quantization="nf4")
print(*sys.modules)
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    imported = ran.stdout.split()
    assert "transformers.models.blip_2.configuration_blip_2" in imported
    assert not {"transformers.modeling_utils", "torch._dynamo", "triton"} & set(imported)


@pytest.mark.parametrize("checkpoint", PARAMETERS)
def test_the_published_sizes_are_what_the_configurations_give(checkpoint: str) -> None:
    retrieval = "itm" in checkpoint
    config = config_of(checkpoint, retrieval=retrieval)
    precision = choose_precision("auto", torch.device("cuda"), config.text_config.model_type)
    parts = parts_of(config, precision, Quantizing(), retrieval=retrieval)
    assert sum(part.parameters for part in parts) == PARAMETERS[checkpoint]


def test_every_known_model_has_its_sizes() -> None:
    for known in KNOWN_MODELS.values():
        assert known.generation in PARAMETERS
        assert known.retrieval in (*PARAMETERS, None)


def test_the_cache_grows_with_rows_and_tokens() -> None:
    small = memory_of("opt-2.7b", load=Load(batch_size=1, beams=1, prompt_tokens=0, new_tokens=1))
    assert small.kv_row == 33 * 327_680  # 32 queries and a token, 2 x 32 layers x 2,560 x fp16
    large = memory_of("opt-2.7b", load=Load(batch_size=16, beams=5, prompt_tokens=0, new_tokens=1))
    assert large.kv_batch == 80 * small.kv_batch
    assert large.weights == small.weights
    assert large.activations > small.activations


def test_texts_in_flight_have_slots_of_their_own() -> None:
    load = Load(slots=10, slot_tokens=100)
    counted = memory_of("Salesforce/blip2-opt-2.7b", load=load)
    assert counted.kv_slots == 10 * 100 * 327_680
    none = memory_of("Salesforce/blip2-opt-2.7b", load=Load(slots=0))
    # On a GPU they are reserved in one piece, on a CPU they grow.
    assert counted.total - none.total == counted.kv_slots
    on_cpu = memory_of("Salesforce/blip2-opt-2.7b", load=load, device="cpu")
    none = memory_of("Salesforce/blip2-opt-2.7b", load=Load(slots=0), device="cpu")
    assert on_cpu.total - none.total == pytest.approx(1.1 * on_cpu.kv_slots, abs=2)


def test_texts_of_an_instructblip_have_longer_slots_on_a_gpu() -> None:
    load = Load(slots=10, slot_tokens=100)
    counted = memory_of(VICUNA, load=load)
    assert counted.kv_slots == 10 * 200 * 524_288  # 2 x 32 layers x 4,096 x fp16
    assert memory_of(VICUNA, load=load, device="cpu").load == load


def test_the_cache_of_features_counts_where_it_is() -> None:
    load = Load(feature_cache=3 * GIB)
    assert memory_of("opt-2.7b", load=load).total == memory_of("opt-2.7b").total
    on_cpu = (memory_of("opt-2.7b", device="cpu", load=each).total for each in (load, Load()))
    assert next(on_cpu) - next(on_cpu) == 3 * GIB


def test_a_larger_picture_takes_more_to_look_at() -> None:
    small, large = (memory_of(name).vision for name in ("opt-2.7b", "opt-2.7b-coco"))
    assert large / small == pytest.approx(677 / 257)


def test_what_heat_maps_take_is_told_beside_the_total(checkpoints: dict[str, Path]) -> None:
    what = f"{checkpoints['opt']}+{checkpoints['itm']}"
    own = read_plain(open_checkpoint(str(checkpoints["itm"])), torch.device("cpu"))
    for device in ("cpu", "cuda"):
        counted = memory_of(what, device=device)
        assert counted.heat_maps == sum(weight.nbytes for weight in own.parameters())
    assert memory_of(str(checkpoints["opt"])).heat_maps == 0
    assert memory_of("opt-2.7b").heat_maps / GIB == pytest.approx(0.7, abs=0.05)
    lines = run("memory", "opt-2.7b").stdout
    assert re.search(r"heat maps +beside the total, once one is drawn +0\.69 GiB", lines)
    assert max(map(len, lines.splitlines())) <= 80


def test_the_tower_that_may_be_shared_is_told() -> None:
    assert memory_of("opt-2.7b").shared == 985_952_256 * 2
    assert memory_of("Salesforce/blip2-opt-2.7b").shared == 0


@pytest.mark.parametrize(
    ("name", "gib"),
    [
        ("opt-2.7b", (7.2, 4.8, 3.7)),
        ("opt-6.7b", (14.6, 8.6, 5.7)),
        ("flan-t5-xl", (7.5, 5.5, 4.5)),
        ("flan-t5-xxl", (23.0, 14.7, 10.7)),
        ("instructblip-flan-t5-xl", (7.8, 5.8, 4.8)),
        ("instructblip-flan-t5-xxl", (23.3, 15.0, 11.0)),
        ("instructblip-vicuna-7b", (15.1, 9.1, 6.1)),
        ("instructblip-vicuna-13b", (26.8, 15.0, 9.2)),
    ],
)
def test_the_published_models_take_what_the_documentation_says(
    name: str, gib: tuple[float, ...]
) -> None:
    page = INSTRUCTED_PAGE if name.startswith("instructblip-") else PAGE
    found = tuple(
        round(memory_of(KNOWN_MODELS[name].generation, quantization=each).weights / GIB, 1)  # type: ignore[arg-type]
        for each in ("none", "int8", "nf4")
    )
    assert found == gib
    row = next(line for line in page.read_text().splitlines() if line.startswith(f"| `{name}` |"))
    assert all(f"{size} GiB" in row for size in gib)


def test_int8_takes_more_than_nf4_and_less_than_none() -> None:
    nf4, int8, none = (
        memory_of("opt-2.7b", quantization=each).weights / GIB  # type: ignore[arg-type]
        for each in ("nf4", "int8", "none")
    )
    assert nf4 < int8 < none


@pytest.mark.parametrize(
    ("gib", "verdict"), [(80, "fits: "), (10, "tight: "), (8, "does not fit: ")]
)
def test_the_verdict_is_about_the_smallest_card(gib: int, verdict: str) -> None:
    needed = Memory("m", "cuda", "nf4", Load(), (), 0, 0, 0, 0, context=int(9.5 * GIB))
    cards = [Gpu("large", 141 * GIB), Gpu("small", gib * GIB)]
    assert memory.verdict(needed, cards).startswith(verdict)


def test_without_a_gpu_the_verdict_names_a_card() -> None:
    needed = Memory("m", "cuda", "nf4", Load(), (), 0, 0, 0, 0, context=int(9.5 * GIB))
    assert "at least 12 GiB" in memory.verdict(needed, [])


def test_the_command_counts_a_checkpoint_of_ones_own(checkpoints: dict[str, Path]) -> None:
    told = run("memory", f"{checkpoints['t5']}+{checkpoints['itm']}", "--json", "--batch-size", "2")
    counted = json.loads(told.stdout)
    assert counted["load"]["batch_size"] == 2
    assert counted["weights"] == sum(part["bytes"] for part in counted["parts"])


def test_a_model_that_nobody_knows_is_one_line() -> None:
    told = run("memory", "opt-9000b")
    assert told.returncode == 2
    assert told.stderr.count("\n") == 1
    assert "opt-2.7b" in told.stderr


def test_the_list_says_what_is_on_disk(tmp_path: Path) -> None:
    told = run("list", HF_HOME=str(tmp_path))
    assert "Salesforce/blip2-opt-2.7b 15.0 GB not here" in " ".join(told.stdout.split())
    assert len(json.loads(run("list", "--json").stdout)["models"]) == len(KNOWN_MODELS)


def test_weights_in_the_hubs_cache_are_found(
    checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    snapshot = tmp_path / "models--owner--mine" / "snapshots" / "abc"
    shutil.copytree(checkpoints["opt"], snapshot)
    assert weights_of("owner/mine").present
    (snapshot / "model.safetensors").unlink()
    assert not weights_of("owner/mine").present


def test_half_a_download_is_not_present(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "one.safetensors").write_bytes(b"1")
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert not weights_of(str(tmp_path)).present
    (tmp_path / "two.safetensors").write_bytes(b"2")
    assert weights_of(str(tmp_path)).bytes == 2


def test_what_is_missing_is_told_with_size_and_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "not" / "yet"))
    told = how_to_get([weights_of("Salesforce/blip2-opt-2.7b"), weights_of("owner/other@v1")])
    assert "hf download Salesforce/blip2-opt-2.7b --exclude" in told
    assert "hf download owner/other --revision v1" in told
    assert "unknown size" in told
    assert f"free in {tmp_path}" in told
    assert weights.free_bytes() > 0


def test_what_keeps_a_folder_from_being_a_checkpoint_is_told(tmp_path: Path) -> None:
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text("{}")
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "model.safetensors").write_bytes(b"1")
    (tmp_path / "lavis.pth").write_bytes(b"1")
    for name, told in (
        ("lora", "a LoRA adapter"),
        ("half", "has no config.json"),
        ("lavis.pth", "is a file: name a checkpoint's folder"),
        ("gone", "there is no folder"),
    ):
        found = weights_of(str(tmp_path / name))
        assert not found.present
        assert told in how_to_get([found])


def test_a_worker_without_its_weights_says_so_in_one_line(tmp_path: Path) -> None:
    environment = {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "BLIPQ_LOG_LEVEL": "ERROR"}
    ended = subprocess.run(
        [sys.executable, "-m", "blipq_worker"],
        capture_output=True,
        text=True,
        env={**os.environ, **environment, "BLIPQ_MODELS": "default=opt-2.7b"},
        timeout=90,
    )
    assert ended.returncode == 78
    (line,) = ended.stderr.splitlines()
    for told in ("blip2-opt-2.7b", "hf download", "blip2-itm-vit-g", "about 19.7 GB", "GB free"):
        assert told in line


def test_a_configuration_that_is_not_here_is_refused() -> None:
    with pytest.raises(ModelError, match=r"config\.json"):
        config_of("owner/absent")


@pytest.mark.parametrize(
    ("config", "told"),
    [
        (None, "has no config.json: name a folder that save_pretrained wrote"),
        ("{", "config.json is unusable"),
        ('{"model_type": "bert"}', "is of 'bert', not of BLIP-2"),
        (
            '{"model_type": "blip-2", "text_config": {"model_type": "bloom"}}',
            "'bloom': OPT, T5 and Llama",
        ),
    ],
)
def test_no_model_is_made_of_a_folder_that_is_no_checkpoint(
    tmp_path: Path, config: str | None, told: str
) -> None:
    """Before, the published model's memory was counted for it."""
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    ran = run("memory", str(tmp_path))
    assert (ran.returncode, ran.stdout) == (2, "")
    last = ran.stderr.splitlines()[-1]  # transformers may warn before it
    assert last.startswith("blipq models: ")
    assert told in last


def test_a_worker_warns_before_it_runs_out(
    checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    what = f"{checkpoints['opt']}+{checkpoints['itm']}"
    options = WorkerSettings(models={"default": what}, canary=False, dtype="float32")
    load_models(options)
    assert not caplog.records
    monkeypatch.setattr(memory, "available_bytes", lambda device: GIB // 4)
    load_models(options)
    (record,) = caplog.records
    assert record.name == load.__name__
    assert "0.2 GiB are free on cpu" in record.message
    assert f"`blipq models memory {what}`" in record.message


def test_what_cannot_be_counted_yet_is_not_warned_of() -> None:
    options = WorkerSettings(models={"default": "owner/absent"})
    assert memory.shortage(options, "owner/absent", "cpu", "none") is None


@pytest.mark.parametrize(("quantization", "gib"), [("none", 19.5), ("nf4", 15.9), ("int8", 17.1)])
def test_the_count_is_near_what_a_card_has_used(quantization: Any, gib: float) -> None:
    """The most that an H100 had allocated for this load (docs/gpu.md), without its context."""
    load = Load(slots=128)
    counted = memory_of("Salesforce/blip2-opt-2.7b", quantization=quantization, load=load)
    assert gib <= (counted.total - counted.context) / GIB <= 1.05 * gib


@pytest.mark.parametrize(
    ("models", "free", "kept"),
    [
        ({"default": "opt-2.7b"}, 80, "none"),
        ({"default": "opt-2.7b"}, 24, "none"),
        ({"default": "opt-2.7b"}, 12, "nf4"),
        ({"one": "opt-2.7b", "two": "flan-t5-xl"}, 24, "nf4"),
        ({"one": "opt-2.7b", "two": "flan-t5-xl"}, 80, "none"),
        ({"default": "flan-t5-xxl"}, 24, "nf4"),
    ],
)
def test_weights_are_quantized_where_they_do_not_fit_in_full(
    models: dict[str, str], free: int, kept: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Quantized steps are slower: they are for cards that are too small."""
    monkeypatch.setattr(memory, "available_bytes", lambda device: free * GIB)
    found, why = memory.kept_on("cuda", WorkerSettings(models=models))
    assert found == kept
    assert f"and {free}.0 GiB are free on cuda" in why
    assert ("nf4: in full they take" in why) == (kept == "nf4")


def test_what_is_set_is_kept_and_a_cpu_quantizes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda device: GIB)
    for quantization in ("none", "int8", "nf4"):
        options = WorkerSettings(quantization=quantization)
        for device in ("cpu", "cuda"):
            assert memory.kept_on(device, options)[0] == quantization
    assert memory.kept_on("cpu", WorkerSettings())[0] == "none"


def test_a_configuration_is_fetched_to_decide_by_it(
    checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a first start would quantize what a second one does not, and answer otherwise."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(memory, "available_bytes", lambda device: 80 * GIB)
    options = WorkerSettings(models={"default": "owner/mine@v1"})
    asked: list[tuple[Any, ...]] = []

    def fetch(*args: Any, revision: str) -> None:
        asked.append((*args, revision))
        folder = tmp_path / "models--owner--mine" / "snapshots" / "abc"
        folder.mkdir(parents=True)
        shutil.copy(checkpoints["opt"] / "config.json", folder)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fetch)
    assert memory.kept_on("cuda", options)[0] == "none"
    assert asked == [("owner/mine", "config.json", "v1")]


def test_what_cannot_be_fetched_is_left_to_loading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))

    def refuse(*args: Any, **options: Any) -> None:
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", refuse)
    options = WorkerSettings(models={"default": "owner/absent"})
    kept, why = memory.kept_on("cuda", options)
    assert (kept, why) == ("nf4", "nf4: how much they take in full is not known")


def test_without_a_wish_the_command_counts_what_a_worker_would_take() -> None:
    def count(kept: Any) -> Memory:
        return memory_of("opt-2.7b", quantization=kept)

    small, large = Gpu("small", 12 * GIB), Gpu("large", 80 * GIB)
    assert memory.for_cards(count, []).quantization == "none"
    assert memory.for_cards(count, [large]).quantization == "none"
    assert memory.for_cards(count, [large, small]).quantization == "nf4"


def test_a_containers_limit_counts(tmp_path: Path) -> None:
    meminfo, cgroup = tmp_path / "meminfo", tmp_path / "cgroup"
    assert memory._free_memory(meminfo, cgroup) is None
    meminfo.write_text("MemTotal:  9000 kB\nMemAvailable:  8000 kB\n")
    assert memory._free_memory(meminfo, cgroup) == 8000 * 1024
    cgroup.mkdir()
    (cgroup / "memory.current").write_text("1000000\n")
    for limit, free in (("max", 8000 * 1024), ("3000000", 2_000_000), ("99999999", 8000 * 1024)):
        (cgroup / "memory.max").write_text(f"{limit}\n")
        assert memory._free_memory(meminfo, cgroup) == free


def test_the_command_counts_for_a_cpu_too() -> None:
    told = run("memory", "demo", "--device", "cpu", "--quantize-vision", "--quantization", "int8")
    assert "demo, int8+vision, on cpu" in told.stdout
    assert "fits: " in told.stdout


@pytest.mark.parametrize("device", ["cuda:0,cuda:1", "balanced"])
@pytest.mark.parametrize(
    ("gib", "told"),
    [
        (None, r"opt-6.7b in full 2\d.\d GiB, opt-6.7b with BLIPQ_QUANTIZATION=int8"),
        (16, r"16.0 GiB hold: .*opt-2.7b with BLIPQ_QUANTIZATION=nf4 1\d.\d GiB"),
        (2, r"2.0 GiB hold none: the least is opt-2.7b with BLIPQ_QUANTIZATION=nf4, \d+.\d GiB"),
    ],
)
def test_a_model_over_two_gpus_is_answered_with_what_fits_on_one(
    device: str, gib: int | None, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cards = [] if gib is None else [Gpu("large", 80 * GIB), Gpu("small", gib * GIB)]
    monkeypatch.setattr(memory, "gpus", lambda: cards)
    options = WorkerSettings(models={"default": "opt-6.7b"}, device=device)
    with pytest.raises(ModelError, match=f"never split over several GPUs. {told}") as raised:
        memory.require_one_device(options)
    assert "--processes" in str(raised.value)


@pytest.mark.parametrize("device", ["auto", "cpu", "cuda", "cuda:1"])
def test_one_device_is_enough(device: str) -> None:
    memory.require_one_device(WorkerSettings(device=device))


def test_a_device_that_nobody_knows_is_named() -> None:
    with pytest.raises(ModelError, match="BLIPQ_DEVICE=mps is none of auto, cpu, cuda and cuda:N"):
        memory.require_one_device(WorkerSettings(device="mps"))


def test_what_is_smaller_takes_less() -> None:
    """Of a folder of one's own, too, whose size is known; nothing larger is offered."""
    options = WorkerSettings(device="cpu")
    assert "opt-2.7b" not in memory.instead(options, "demo", None, "cpu")
    assert memory.instead(options, "nowhere/at-all", None).startswith("opt-2.7b in full 1")
