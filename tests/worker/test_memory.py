"""The counted memory, against what really gets loaded; and what is said of missing weights."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from blipq_worker import memory, weights
from blipq_worker.blip2 import Blip2
from blipq_worker.blip2.loading import choose_precision
from blipq_worker.memory import GIB, Gpu, Load, Memory, config_of, memory_of, parts_of
from blipq_worker.models import KNOWN_MODELS, PARAMETERS, ModelError
from blipq_worker.weights import how_to_get, weights_of

LAYERS = {"nf4": "Linear4bit", "int8": "Linear8bitLt"}


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "blipq_worker.memory", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        timeout=90,
    )


@pytest.mark.parametrize("name", ["opt", "t5"])
def test_weights_are_counted_as_they_are_loaded(checkpoints: dict[str, Path], name: str) -> None:
    opened = Blip2.load(str(checkpoints[name]), dtype="bfloat16").generator.model
    counted = parts_of(
        config_of(str(checkpoints[name])),
        choose_precision("bfloat16", torch.device("cpu"), "opt"),
        "none",
    )
    assert sum(part.bytes for part in counted) == sum(
        weight.nbytes for weight in opened.parameters()
    )


def test_a_retrieval_checkpoint_is_counted_as_it_is_loaded(checkpoints: dict[str, Path]) -> None:
    model = Blip2.load(str(checkpoints["opt"]), str(checkpoints["itm"]), dtype="bfloat16")
    assert model.matcher is not None
    config = config_of(str(checkpoints["itm"]), retrieval=True)
    precision = choose_precision("bfloat16", torch.device("cpu"), "retrieval")
    counted = parts_of(config, precision, "none", retrieval=True)
    assert sum(part.bytes for part in counted) == sum(
        weight.nbytes for weight in model.matcher.model.parameters()
    )


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
@pytest.mark.parametrize("name", ["opt", "t5"])
def test_the_same_layers_are_counted_as_quantized_that_are(
    checkpoints: dict[str, Path], name: str, quantization: Any
) -> None:
    opened = Blip2.load(str(checkpoints[name]), quantization=quantization).generator.model
    quantized = {
        f"{place}.weight"
        for place, module in opened.named_modules()
        if type(module).__name__ == LAYERS[quantization]
    }
    config = config_of(str(checkpoints[name]))
    with torch.device("meta"):
        blank: Any = memory._model_class(retrieval=False)(config)
    assert memory._quantized_weights(blank, config) == quantized


@pytest.mark.parametrize("checkpoint", PARAMETERS)
def test_the_published_sizes_are_what_the_configurations_give(checkpoint: str) -> None:
    retrieval = "itm" in checkpoint
    config = config_of(checkpoint, retrieval=retrieval)
    precision = choose_precision("auto", torch.device("cuda"), config.text_config.model_type)
    parts = parts_of(config, precision, "none", retrieval=retrieval)
    assert sum(part.parameters for part in parts) == PARAMETERS[checkpoint]


def test_every_known_model_has_its_sizes() -> None:
    for known in KNOWN_MODELS.values():
        assert known.generation in PARAMETERS
        assert known.retrieval in PARAMETERS


def test_the_cache_grows_with_rows_and_tokens() -> None:
    small = memory_of("opt-2.7b", load=Load(batch_size=1, beams=1, prompt_tokens=0, new_tokens=1))
    assert small.kv_row == 33 * 327_680  # 32 queries and a token, 2 x 32 layers x 2,560 x fp16
    large = memory_of("opt-2.7b", load=Load(batch_size=16, beams=5, prompt_tokens=0, new_tokens=1))
    assert large.kv_batch == 80 * small.kv_batch
    assert large.weights == small.weights
    assert large.activations > small.activations


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
    needed = Memory("m", "nf4", Load(), (), 0, 0, context=int(9.5 * GIB))
    cards = [Gpu("large", 141 * GIB), Gpu("small", gib * GIB)]
    assert memory.verdict(needed, cards).startswith(verdict)


def test_without_a_gpu_the_verdict_names_a_card() -> None:
    needed = Memory("m", "nf4", Load(), (), 0, 0, context=int(9.5 * GIB))
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
