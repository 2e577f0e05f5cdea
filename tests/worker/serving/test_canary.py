"""A model that answers nonsense is refused; one that is well passes in every precision."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from blipq import Client, Settings, cli
from blipq.local.stack import LocalStack
from blipq_worker import demo
from blipq_worker.blip2 import Blip2
from blipq_worker.blip2.loading.checkpoints import open_checkpoint
from blipq_worker.blip2.loading.weights import load_tokenizer
from blipq_worker.catalog.models import ModelError
from blipq_worker.serving import canary, goldens
from blipq_worker.serving.canary import CanaryError
from blipq_worker.serving.goldens import Golden, GoldenError, Observation, read_goldens, tolerance
from blipq_worker.serving.loader import load_models
from blipq_worker.settings import WorkerSettings
from conftest import start_worker, wait_until

PRECISIONS = [("none", "float32"), ("none", "bfloat16"), ("int8", "auto"), ("nf4", "auto")]
WELL = Observation(
    captions=("a red circle", "a blue square"),
    answers=("red", "blue"),
    likelihoods=((-10.0, -30.0), (-40.0, -20.0)),
    matches=((0.9, 0.1), (0.0, 1.0)),
)


def load(quantization: Any = "none", dtype: Any = "float32") -> Blip2:
    return Blip2.load(str(demo.OPT), str(demo.ITM), quantization=quantization, dtype=dtype)


def shuffled(weight: torch.Tensor) -> torch.Tensor:
    order = torch.randperm(len(weight), generator=torch.Generator().manual_seed(3))
    return weight[order]


def without_pictures(model: Any) -> None:
    model.language_projection.weight.zero_()


def with_a_shuffled_output(model: Any) -> None:
    head = model.language_model.lm_head
    head.weight = torch.nn.Parameter(shuffled(head.weight.data), requires_grad=False)


def with_what_is_no_number(model: Any) -> None:
    model.qformer.layernorm.weight[0] = math.nan


def with_one_word(model: Any) -> None:
    """Of all tokens the one for the word red is always the most likely."""
    head, tokenizer = model.language_model.lm_head, load_tokenizer(open_checkpoint(str(demo.OPT)))
    (red,) = tokenizer(" red", add_special_tokens=False)["input_ids"]
    own = head.weight.data.clone()
    head.weight = torch.nn.Parameter(own, requires_grad=False)
    head.bias = torch.nn.Parameter(torch.zeros(len(own)), requires_grad=False)
    head.bias[red] = 1000.0


@pytest.mark.parametrize(("quantization", "dtype"), PRECISIONS)
def test_the_demo_model_says_what_was_recorded(quantization: str, dtype: str) -> None:
    said = canary.check(load(quantization, dtype), read_goldens()["demo"])
    assert said.captions == ("a red circle in the center", "a blue square in the center")


def test_the_golden_is_of_the_weights_that_blipq_brings() -> None:
    revisions = tuple(open_checkpoint(str(each)).revision for each in (demo.OPT, demo.ITM))
    command = "blipq models record-golden demo --dtype float32 --output worker/.../goldens.json"
    assert read_goldens()["demo"].revisions == revisions, f"run {command}"


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (without_pictures, "two different pictures look the same"),
        (with_a_shuffled_output, "its texts should be 'a red circle in the center'"),
        (with_what_is_no_number, "not finite"),
        (with_one_word, "it repeats itself: 'red red"),
    ],
)
def test_a_damaged_model_is_refused(damage: Callable[[Any], None], told: str) -> None:
    model = load()
    damage(model.generator.model)
    with pytest.raises(CanaryError, match=told):
        canary.check(model, read_goldens()["demo"])


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda head: head.normal_(std=1e-4), "it guesses: its own words have a chance of 0"),
        (lambda head: head.copy_(shuffled(head)), "its texts should be"),
    ],
)
def test_a_model_of_ones_own_that_writes_nonsense_is_told_what_to_check(
    change: Callable[[torch.Tensor], Any], told: str, tmp_path: Path
) -> None:
    """Its golden is recorded before its weights are spoilt, as by a wrong base."""
    for each in demo.OPT.iterdir():
        (tmp_path / each.name).write_bytes(each.read_bytes())
    known = tmp_path / "goldens.json"
    golden = canary.golden_of(Blip2.load(str(tmp_path), dtype="float32"))
    goldens.write_golden(known, str(tmp_path), golden)
    weights = load_file(tmp_path / "model.safetensors")
    (name,) = [name for name in weights if name.endswith("embed_tokens.weight")]
    change(weights[name])
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    settings = WorkerSettings(
        models={"default": str(tmp_path)}, goldens=known, dtype="float32", device="cpu"
    )
    with pytest.raises(ModelError, match=f"{told}.*For a model of your own check") as raised:
        load_models(settings)
    assert "(LoRA) was merged" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_text_without_a_word_is_nonsense() -> None:
    with pytest.raises(CanaryError, match="it writes no word"):
        canary._require_sense(WELL.model_copy(update={"captions": (". , ; -", "a blue square")}))


def test_a_damaged_matching_head_is_refused() -> None:
    model = load()
    assert model.matcher is not None
    model.matcher.model.itm_head.register_forward_hook(lambda head, args, scores: -scores)
    with pytest.raises(CanaryError, match="its matching probabilities should be"):
        canary.check(model, read_goldens()["demo"])


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"captions": ("a red circle", " ")}, "it writes nothing"),
        ({"captions": ("red red red red", "a blue square")}, "it repeats itself"),
        ({"captions": ("the cat cat cat cat on", "a blue square")}, "it repeats itself"),
        ({"captions": ("::::::::", "a blue square")}, "it repeats itself"),
        ({"likelihoods": ((-9.0, -30.0), (-9.01, -30.02))}, "the same for two different pictures"),
        ({"likelihoods": ((-9.0, math.nan), (-7.0, -5.0))}, "its log-likelihoods are"),
        ({"matches": ((0.5, math.nan), (0.5, 0.5))}, "its matching probabilities are"),
    ],
)
def test_without_a_golden_it_must_make_sense(changed: dict[str, Any], told: str) -> None:
    with pytest.raises(CanaryError, match=told):
        canary._require_sense(WELL.model_copy(update=changed))


def test_what_makes_sense_is_not_refused() -> None:
    texts = ("a dog and a dog and a cat", "2 2 3 3 4", "a very very big red circle")
    for text in texts:
        canary._require_sense(WELL.model_copy(update={"captions": (text, text)}))


def test_fewer_bits_may_differ_more() -> None:
    near = WELL.model_copy(update={"captions": ("a red circle on white", "a blue square")})
    far = WELL.model_copy(update={"captions": ("the cat", "dogs on a beach")})
    exact, loose = tolerance(("float32", "none")), tolerance(("bfloat16", "nf4"))
    assert "its texts should be 'a red circle'" in (goldens.difference(WELL, near, exact) or "")
    assert goldens.difference(WELL, near, loose) is None
    assert goldens.difference(WELL, far, loose) is not None
    assert goldens.difference(WELL, WELL, exact) is None


@pytest.mark.parametrize("field", ["likelihoods", "matches"])
def test_numbers_are_compared_too(field: str) -> None:
    exact, loose = tolerance(("float32", "none")), tolerance(("float16", "nf4"))
    rows = [list(row) for row in getattr(WELL, field)]
    rows[0][0] -= 0.25 if field == "matches" else 3.0
    moved = WELL.model_copy(update={field: tuple(map(tuple, rows))})
    assert goldens.difference(WELL, moved, exact) is not None
    assert goldens.difference(WELL, moved, loose) is None


def test_the_loosest_of_both_precisions_counts() -> None:
    """A golden from a GPU's 16 bits binds fp32 no more closely than it is itself."""
    half = tolerance(("float16", "none"))
    assert tolerance(("float16", "none"), ("float32", "none")) == half
    assert tolerance(("float32", "none"), ("bfloat16", "int8+vision")) == tolerance(("", "nf4"))


def test_a_file_that_holds_no_goldens_is_told(tmp_path: Path) -> None:
    for content in (b"[]", b'{"demo": {"dtype": 3}}', b"no json", b"\xef\xbb\xbf{}", b"\xff\xfe"):
        (tmp_path / "goldens.json").write_bytes(content)
        with pytest.raises(GoldenError, match=r"no file of `blipq models record-golden`"):
            read_goldens(tmp_path / "goldens.json")
    with pytest.raises(ModelError, match="absent"):
        load_models(WorkerSettings(goldens=tmp_path / "absent.json"))


def test_a_recorded_golden_refuses_a_copy_that_was_damaged(tmp_path: Path) -> None:
    folder, file = tmp_path / "mine", tmp_path / "goldens.json"
    folder.mkdir()
    for each in demo.OPT.iterdir():
        (folder / each.name).write_bytes(each.read_bytes())
    options = ["--output", str(file), "--dtype", "float32"]
    recording = CliRunner().invoke(cli.app, ["models", "record-golden", str(folder), *options])
    assert recording.exit_code == 0, recording.stderr
    assert "a red circle in the center" in recording.stdout
    recorded = Golden.model_validate(json.loads(file.read_text())[str(folder)])
    assert recorded.said.matches is None
    settings = WorkerSettings(models={"default": str(folder)}, goldens=file, dtype="bfloat16")
    info = load_models(settings)["default"].info
    assert info.checkpoint == str(folder)
    assert info.load_seconds > 0

    weights = load_file(folder / "model.safetensors")
    (name,) = [name for name in weights if name.endswith("embed_tokens.weight")]
    weights[name] = shuffled(weights[name])
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"its check: its texts should be 'a red circle .*BLIPQ_"):
        load_models(settings)


@pytest.mark.parametrize("family", ["t5", "llama"])
def test_an_instructblip_is_checked_with_its_instructions(
    instructed_checkpoints: dict[str, Path], family: str
) -> None:
    model = Blip2.load(str(instructed_checkpoints[family]), dtype="float32")
    golden = canary.golden_of(model)
    assert canary.check(model, golden) == golden.said
    with torch.inference_mode():
        model.generator.model.qformer.embeddings.word_embeddings.weight.neg_()
    with pytest.raises(CanaryError, match="its texts should be"):
        canary.check(model, golden)
    blind = Blip2.load(str(instructed_checkpoints[family]), dtype="float32")
    with torch.inference_mode():
        blind.generator.model.query_tokens.zero_()
        for layer in blind.generator.model.qformer.encoder.layer:
            if layer.has_cross_attention:
                layer.crossattention.output.dense.weight.zero_()
    with pytest.raises(CanaryError, match="two different pictures look the same"):
        canary.check(blind)


def test_a_model_that_does_not_fit_is_told_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **kwargs: Any) -> Blip2:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.\nGPU 0 ...")

    monkeypatch.setattr(Blip2, "load", full)
    with pytest.raises(ModelError, match=r"does not fit: CUDA.*`blipq models memory demo`"):
        load_models(WorkerSettings())


def test_a_worker_that_fails_its_check_takes_no_job(
    apart: Settings, stack: LocalStack, tmp_path: Path
) -> None:
    for each in demo.OPT.iterdir():
        (tmp_path / each.name).write_bytes(each.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    weights["language_projection.weight"].zero_()
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with Client(apart) as client:
        job = client.caption("s3://uploads/a.png")
        worker = start_worker(
            stack,
            tmp_path / "worker.log",
            redis_url=apart.redis_url,
            models=f"default={tmp_path}",
        )
        wait_until(lambda: worker.exit_code is not None, "the worker's end", timeout=90)
        assert worker.exit_code == 78
        assert "two different pictures look the same to it" in worker.last_words(1)
        info = job.info()
        assert (info.status, info.attempts) == ("queued", 0)
