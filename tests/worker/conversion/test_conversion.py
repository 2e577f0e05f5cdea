"""Checkpoints of LAVIS as folders: the same numbers, and what was missing or unknown is listed."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from blipq import Client, Settings, cli
from blipq.local.stack import LocalStack
from blipq_worker import demo
from blipq_worker.blip2 import Blip2, MatchItem, RerankItem
from blipq_worker.blip2.loading.checkpoints import open_checkpoint
from blipq_worker.conversion import contents as reading
from blipq_worker.conversion.base import base_of
from blipq_worker.conversion.contents import ConversionError
from blipq_worker.conversion.convert import convert
from blipq_worker.conversion.report import Conversion
from blipq_worker.serving import canary
from blipq_worker.serving.goldens import read_goldens
from conftest import start_worker, wait_for_worker
from renders import distinct_scenes, png
from worker.conversion import lavis

KINDS = ["opt", "t5", "retrieval"]
SIDE, LARGER = 28, 42
TEXTS = ("a red circle above the dog", "a cat")


@pytest.fixture
def bases(checkpoints: dict[str, Path]) -> dict[str, Path]:
    return {**checkpoints, "retrieval": checkpoints["itm"]}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "written" / "model"


def whole(kind: str, bases: dict[str, Path], file: Path) -> lavis.State:
    """A file with every weight, and its state."""
    state = lavis.random_state(kind, bases[kind], side=SIDE)
    lavis.save(file, state, image_size=SIDE)
    return state


def require_laviss_numbers(
    kind: str, folder: Path, state: lavis.State, bases: dict[str, Path], picture: Image.Image
) -> None:
    """Raises AssertionError unless the folder computes what LAVIS does with the state."""
    side = open_checkpoint(str(folder)).image_size
    with torch.inference_mode():
        image = lavis.seen(state, lavis.pixels(picture, side))
        if kind == "retrieval":
            model = Blip2.load(str(bases["opt"]), str(folder), dtype="float32")
            require_matching(model, state, image, picture)
        else:
            model = Blip2.load(str(folder), dtype="float32")
            require_writing(kind, model, state, image, picture, bases[kind])


def require_matching(model: Blip2, state: lavis.State, image: Any, picture: Image.Image) -> None:
    assert model.matcher is not None
    shown = model.preprocess(picture)
    itm = model.rerank([RerankItem(shown, text) for text in TEXTS])
    (itc,) = model.match([MatchItem(shown, TEXTS, "itc")])
    for text, (logit, probability), cosine in zip(TEXTS, itm, itc, strict=True):
        ids = torch.tensor([model.matcher.texts.ids(text)])
        expected = lavis.matched(state, image, ids)[0]
        assert logit == pytest.approx(float(expected[1]), abs=1e-5)
        assert probability == pytest.approx(float(expected.softmax(dim=0)[1]), abs=1e-5)
        assert cosine == pytest.approx(float(lavis.cosine(state, image, ids)), abs=1e-5)


def require_writing(
    kind: str, model: Blip2, state: lavis.State, image: Any, picture: Image.Image, base: Path
) -> None:
    expected = lavis.projected(kind, state, image)
    found = model.generator.project([model.preprocess(picture)])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    network = lavis.language_model(kind, base)
    prefix = f"{kind}_model."
    own = {name: each for name, each in state.items() if name.startswith(prefix)}
    network.load_state_dict({name.removeprefix(prefix): each for name, each in own.items()})
    starts = {} if kind == "opt" else {"decoder_input_ids": torch.tensor([[0, 5, 7]])}
    converted = model.generator.model.language_model
    torch.testing.assert_close(
        converted(inputs_embeds=found, **starts).logits,
        network(inputs_embeds=expected, **starts).logits,
        rtol=0,
        atol=1e-5,
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_with_every_weight_needs_none_of_the_base(
    kind: str, bases: dict[str, Path], folder: Path, tmp_path: Path, pictures: list[Image.Image]
) -> None:
    state = whole(kind, bases, tmp_path / "whole.pth")
    done = convert(tmp_path / "whole.pth", folder, str(bases[kind]))
    assert (done.from_base, done.unknown, done.epoch) == ((), (), 4)
    assert done.beside == ("config", "epoch", "optimizer", "scaler")
    assert not [path for path in folder.parent.iterdir() if path != folder]
    require_laviss_numbers(kind, folder, state, bases, pictures[0])


@pytest.mark.parametrize("kind", KINDS)
def test_frozen_weights_that_lavis_dropped_are_the_bases_and_are_listed(
    kind: str, bases: dict[str, Path], folder: Path, tmp_path: Path, pictures: list[Image.Image]
) -> None:
    began = whole(kind, bases, tmp_path / "whole.pth")
    base = tmp_path / "base"
    convert(tmp_path / "whole.pth", base, str(bases[kind]))
    state = lavis.tuned(began)
    lavis.save(tmp_path / "tuned.pth", lavis.trained(state), image_size=SIDE)
    done = convert(tmp_path / "tuned.pth", folder, str(base))
    parts = {name.partition(".")[0] for name in done.from_base}
    assert parts == (
        {"vision_model"} if kind == "retrieval" else {"vision_model", "language_model"}
    )
    assert "vision_model.post_layernorm.weight" not in done.from_base
    require_laviss_numbers(kind, folder, state, bases, pictures[0])


@pytest.mark.parametrize("kind", ["opt", "t5"])
def test_tied_weights_that_lavis_leaves_in_a_tune_are_taken_or_dropped(
    kind: str, bases: dict[str, Path], folder: Path, tmp_path: Path
) -> None:
    """In 16 bits, in which LAVIS holds what is frozen; the base has more."""
    state = lavis.random_state(kind, bases[kind], side=SIDE)
    lavis.save(tmp_path / "whole.pth", state, image_size=SIDE)
    base = tmp_path / "base"
    convert(tmp_path / "whole.pth", base, str(bases[kind]))
    least = torch.float16 if kind == "opt" else torch.bfloat16
    tune = lavis.trained(state)
    left = {name: each.to(least) for name, each in tune.items() if name in lavis.TIED}
    assert len(left) == (1 if kind == "opt" else 2)
    lavis.save(tmp_path / "tune.pth", {**tune, **left}, image_size=SIDE)
    done = convert(tmp_path / "tune.pth", folder, str(base))
    assert done.unknown == ()
    stored, whole = (load_file(at / "model.safetensors") for at in (folder, base))
    assert stored.keys() == whole.keys()
    for name, each in stored.items():
        assert torch.equal(each, whole[name]), name


@pytest.mark.parametrize("kind", KINDS)
def test_a_tune_at_another_image_size_brings_its_own(
    kind: str, bases: dict[str, Path], folder: Path, tmp_path: Path, pictures: list[Image.Image]
) -> None:
    state = lavis.random_state(kind, bases[kind], side=LARGER)
    lavis.save(tmp_path / "larger.pth", state)
    done = convert(tmp_path / "larger.pth", folder, str(bases[kind]))
    assert done.image_size == LARGER
    require_laviss_numbers(kind, folder, state, bases, pictures[0])


def test_a_frozen_tower_is_resized_to_the_size_that_lavis_trained_at(
    bases: dict[str, Path], folder: Path, tmp_path: Path, pictures: list[Image.Image]
) -> None:
    """A frozen tower's position embeddings are not in the file, but resized at every start."""
    began = whole("opt", bases, tmp_path / "whole.pth")
    base = tmp_path / "base"
    convert(tmp_path / "whole.pth", base, str(bases["opt"]))
    lavis.save(tmp_path / "tuned.pth", lavis.trained(began), image_size=LARGER)
    done = convert(tmp_path / "tuned.pth", folder, str(base))
    assert (done.image_size, done.resized) == (LARGER, True)
    old = began["visual_encoder.pos_embed"]
    grid = old[:, 1:].reshape(1, 2, 2, -1).permute(0, 3, 1, 2)
    grid = torch.nn.functional.interpolate(grid, size=(3, 3), mode="bicubic", align_corners=False)
    new = torch.cat([old[:, :1], grid.permute(0, 2, 3, 1).reshape(1, 9, -1)], dim=1)
    state = {**began, "visual_encoder.pos_embed": new}
    require_laviss_numbers("opt", folder, state, bases, pictures[0])


def test_weights_keep_the_types_that_lavis_saved(
    bases: dict[str, Path], folder: Path, tmp_path: Path
) -> None:
    state = lavis.random_state("opt", bases["opt"], side=SIDE)
    halved = {
        name: each.half() if name.startswith(("visual_encoder.blocks", "opt_model")) else each
        for name, each in state.items()
    }
    lavis.save(tmp_path / "mixed.pth", halved)
    convert(tmp_path / "mixed.pth", folder, str(bases["opt"]))
    written = load_file(folder / "model.safetensors")
    assert written["vision_model.encoder.layers.0.self_attn.qkv.bias"].dtype == torch.float16
    assert written["qformer.layernorm.weight"].dtype == torch.float32
    assert "language_model.lm_head.weight" not in written  # OPT's output layer is its input layer


def test_an_output_layer_of_its_own_stays_its_own(folder: Path, tmp_path: Path) -> None:
    """Flan's is not its input layer, whatever its configuration says."""
    from worker.tiny_models import save_t5

    base = save_t5(tmp_path / "flan", untied=True)
    state = lavis.random_state("t5", base, side=SIDE)
    own = torch.randn_like(state["t5_model.shared.weight"])
    state["t5_model.lm_head.weight"] = own
    lavis.save(tmp_path / "flan.pth", state)
    convert(tmp_path / "flan.pth", folder, str(base))
    stored = load_file(folder / "model.safetensors")["language_model.lm_head.weight"]
    assert torch.equal(stored, own)


def test_what_nothing_takes_and_what_is_unknown_are_listed(
    bases: dict[str, Path], folder: Path, tmp_path: Path
) -> None:
    state = lavis.random_state("retrieval", bases["retrieval"], side=SIDE)
    state["visual_encoder.blocks.0.gamma_1"] = state["adapter.weight"] = torch.ones(2)
    lavis.save(tmp_path / "more.pth", state, prompt="a photo of")
    ran = CliRunner().invoke(
        cli.app,
        [
            "models",
            "convert",
            str(tmp_path / "more.pth"),
            str(folder),
            "--base",
            str(bases["retrieval"]),
            "--json",
        ],
    )
    assert ran.exit_code == 0, ran.output
    done = json.loads(ran.stdout)
    assert done["unknown"] == ["adapter.weight", "visual_encoder.blocks.0.gamma_1"]
    assert "temp" in done["left_out"]
    assert "Qformer.cls.predictions.transform.dense.bias" in done["left_out"]
    told = "\n".join(Conversion(**done).lines())
    for line in ("adapter.weight", "retrieval, 28 px, epoch 4", "'a photo of'", "Qformer.cls: 2"):
        assert line in told


def test_what_is_missing_in_both_is_an_error(
    bases: dict[str, Path], folder: Path, tmp_path: Path
) -> None:
    base = Path(shutil.copytree(bases["opt"], tmp_path / "base"))
    stored = load_file(base / "model.safetensors")
    del stored["vision_model.embeddings.class_embedding"]
    save_file(stored, base / "model.safetensors", metadata={"format": "pt"})
    state = lavis.random_state("opt", bases["opt"], side=SIDE)
    lavis.save(tmp_path / "tuned.pth", lavis.trained(state))
    with pytest.raises(ConversionError, match=r"both lack 1 weights: .*class_embedding"):
        convert(tmp_path / "tuned.pth", folder, str(base))
    assert not list(folder.parent.iterdir())


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"opt_proj.weight": torch.ones(96, lavis.WIDTH)}, "do not belong together: language_proj"),
        ({"visual_encoder.pos_embed": torch.ones(1, 7, lavis.WIDTH)}, "no whole patches of 14"),
        ({"visual_encoder.blocks.0.attn.q_bias": None}, "v_bias alone"),
        ({"Qformer.bert.embeddings.word_embeddings.weight": torch.ones(2, 2)}, "InstructBLIP"),
        ({"llm_proj.weight": torch.ones(2, 2)}, "with a Llama"),
        ({"visual_encoder.transformer.resblocks.0.ln_1.weight": torch.ones(2)}, "ViT-L"),
    ],
)
def test_a_model_of_another_build_is_refused(
    bases: dict[str, Path], folder: Path, tmp_path: Path, change: dict[str, Any], told: str
) -> None:
    state = {**lavis.random_state("opt", bases["opt"], side=SIDE), **change}
    kept = {name: each for name, each in state.items() if each is not None}
    lavis.save(tmp_path / "other.pth", kept)
    with pytest.raises(ConversionError, match=told):
        convert(tmp_path / "other.pth", folder, str(bases["opt"]))
    assert not folder.exists()


@pytest.mark.parametrize(
    "change",
    [
        {"query_tokens": torch.ones(4)},
        {"query_tokens": torch.ones(1, 2**60, 0)},
        {"visual_encoder.pos_embed": torch.ones(1, 0, lavis.WIDTH)},
        {"opt_proj.weight": torch.tensor(1.0)},
        {"visual_encoder.blocks.0.attn.q_bias": torch.tensor(1.0)},
        {"t5_proj.weight": torch.ones(lavis.WIDTH, lavis.WIDTH)},
    ],
)
def test_weights_of_odd_shapes_are_told_in_a_line(
    bases: dict[str, Path], folder: Path, tmp_path: Path, change: dict[str, Any]
) -> None:
    state = {**lavis.random_state("opt", bases["opt"], side=SIDE), **change}
    lavis.save(tmp_path / "odd.pth", state)
    with pytest.raises(ConversionError, match=r"has the shape \(|one weight twice"):
        convert(tmp_path / "odd.pth", folder, str(bases["opt"]))
    assert not folder.exists()


def test_a_base_of_another_kind_is_refused(
    bases: dict[str, Path], folder: Path, tmp_path: Path
) -> None:
    whole("opt", bases, tmp_path / "opt.pth")
    with pytest.raises(ConversionError, match=r"kind opt, and its base .* of the kind retrieval"):
        convert(tmp_path / "opt.pth", folder, str(bases["retrieval"]))


class Hostile:
    """A pickle that runs a program where it is read without care."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.trace}",)


def hostile_zip(file: Path, trace: Path) -> None:
    torch.save({"model": {"opt_proj.weight": Hostile(trace)}}, file)


def hostile_pickle(file: Path, trace: Path) -> None:
    file.write_bytes(pickle.dumps({"model": Hostile(trace)}))


def hostile_legacy(file: Path, trace: Path) -> None:
    torch.save({"model": Hostile(trace)}, file, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize("write", [hostile_zip, hostile_pickle, hostile_legacy])
def test_a_hostile_pickle_runs_nothing(
    write: Callable[[Path, Path], None], folder: Path, tmp_path: Path
) -> None:
    trace = tmp_path / "trace"
    write(tmp_path / "hostile.pth", trace)
    with pytest.raises(ConversionError, match=r"hostile\.pth cannot be read"):
        convert(tmp_path / "hostile.pth", folder)
    assert not trace.exists()
    assert not folder.exists()
    with suppress(Exception):  # a plain pickle is none of torch's files, but is run before that
        torch.load(tmp_path / "hostile.pth", weights_only=False)
    assert trace.exists()  # it would have run


def test_a_module_that_lies_beside_a_hostile_file_is_not_imported(
    bases: dict[str, Path], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder that was unpacked, with a module in it that has the name of one that is needed."""
    trace = tmp_path / "trace"
    (tmp_path / "psutil.py").write_text(f"open({str(trace)!r}, 'w').close()")
    whole("opt", bases, tmp_path / "whole.pth")
    monkeypatch.chdir(tmp_path)
    convert(Path("whole.pth"), folder, str(bases["opt"]))
    assert not trace.exists()


RAW = "\x1b[2J\x9b2J\nwritten: elsewhere\u202e"


@pytest.mark.parametrize("where", ["unknown", "beside", "kind", "global"])
def test_names_in_a_file_move_no_cursor(
    bases: dict[str, Path], folder: Path, tmp_path: Path, where: str
) -> None:
    file = tmp_path / "named.pth"
    state = lavis.random_state("opt", bases["opt"], side=SIDE)
    if where == "unknown":
        lavis.save(file, {**state, RAW: torch.ones(2)})
    elif where == "beside":
        torch.save({"model": state, RAW: 1, "\ud800": 2}, file)
    elif where == "kind":
        torch.save({RAW: torch.ones(2)}, file)
    else:
        file.write_bytes(b"\x80\x02cmodule\x1b[2J\nname\n.")
    command = ["models", "convert", str(file), str(folder), "--base", str(bases["opt"])]
    ran = CliRunner().invoke(cli.app, command)
    assert ran.exit_code == (0 if where in ("unknown", "beside") else 2), ran.output
    assert "\\x1b[2J" in ran.output
    for line in ran.output.splitlines():
        assert line.isprintable()
        assert not line.startswith("written: elsewhere")


def test_a_small_file_that_asks_for_much_memory_is_refused(folder: Path, tmp_path: Path) -> None:
    wide = torch.zeros(1, dtype=torch.uint8).expand(2**33)  # a byte in the file
    torch.save({"model": {"opt_proj.weight": wide}}, tmp_path / "bomb.pth")
    with pytest.raises(ConversionError, match="more memory than weights of its size"):
        convert(tmp_path / "bomb.pth", folder)


def test_a_file_that_is_not_read_in_time_is_given_up(
    bases: dict[str, Path], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole("opt", bases, tmp_path / "slow.pth")
    monkeypatch.setattr(reading, "_SECONDS", 0.0)
    with pytest.raises(ConversionError, match="was not read within 0 s"):
        convert(tmp_path / "slow.pth", folder, str(bases["opt"]))
    assert not list(folder.parent.iterdir())


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "cannot be read"),
        (b"no checkpoint at all", "torch.save writes checkpoints"),
        (pickle.dumps([1, 2]), "cannot be read"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (None, "is no file"),
    ],
)
def test_what_is_no_checkpoint_is_told_in_a_line(
    content: bytes | None, told: str, folder: Path, tmp_path: Path
) -> None:
    file = tmp_path / "odd.pth"
    if content is not None:
        file.write_bytes(content)
    ran = CliRunner().invoke(cli.app, ["models", "convert", str(file), str(folder)])
    assert ran.exit_code == 2
    assert told in ran.stderr
    assert ran.stderr.count("\n") == 1


def test_a_file_that_breaks_off_is_told_in_a_line(
    bases: dict[str, Path], folder: Path, tmp_path: Path
) -> None:
    file = tmp_path / "half.pth"
    whole("opt", bases, file)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(ConversionError, match="cannot be read"):
        convert(file, folder, str(bases["opt"]))


def test_other_models_weights_are_named(folder: Path, tmp_path: Path) -> None:
    torch.save({"text_decoder.bert.weight": torch.ones(2)}, tmp_path / "blip1.pth")
    with pytest.raises(ConversionError, match=r"no weights of a BLIP-2 model: .*text_decoder"):
        convert(tmp_path / "blip1.pth", folder)


def test_a_folder_that_is_there_is_left_alone(
    bases: dict[str, Path], folder: Path, tmp_path: Path
) -> None:
    whole("opt", bases, tmp_path / "whole.pth")
    folder.mkdir(parents=True)
    (folder / "mine").touch()
    with pytest.raises(ConversionError, match="is there already"):
        convert(tmp_path / "whole.pth", folder, str(bases["opt"]))
    assert [path.name for path in folder.iterdir()] == ["mine"]


@pytest.mark.parametrize(
    ("family", "width", "model", "base"),
    [
        ("opt", 2560, {}, "Salesforce/blip2-opt-2.7b"),
        ("opt", 4096, {}, "Salesforce/blip2-opt-6.7b"),
        ("t5", 2048, {}, "Salesforce/blip2-flan-t5-xl"),
        ("t5", 4096, {"model_type": "caption_coco_flant5xxl"}, "Salesforce/blip2-flan-t5-xxl"),
        ("opt", 2560, {"model_type": "caption_coco_opt2.7b"}, "Salesforce/blip2-opt-2.7b-coco"),
        (
            *("opt", 2560, {"model_type": "caption_coco_opt2.7b", "load_finetuned": False}),
            "Salesforce/blip2-opt-2.7b",
        ),
        ("retrieval", 0, {"model_type": "pretrain"}, "Salesforce/blip2-itm-vit-g"),
        ("retrieval", 0, {"model_type": "coco"}, "Salesforce/blip2-itm-vit-g-coco"),
    ],
)
def test_without_a_base_it_is_the_model_that_the_file_began_from(
    family: Any, width: int, model: dict[str, Any], base: str
) -> None:
    assert base_of(None, family, {f"{family}_proj.weight": (width, 768)}, model) == base


def test_without_a_base_an_unknown_width_is_an_error() -> None:
    with pytest.raises(ConversionError, match="64 wide: name a base"):
        base_of(None, "opt", {"opt_proj.weight": (64, 64)}, {})


def demo_as_lavis(folder: Path) -> tuple[Path, Path]:
    """The demo model's two checkpoints as LAVIS would have saved their training."""
    files = []
    for name in ("opt", "itm"):
        stored = load_file(demo.OPT.parent / name / "model.safetensors")
        file = folder / f"{name}.pth"
        lavis.save(file, lavis.trained(lavis.as_lavis(stored)), image_size=64)
        files.append(file)
    return files[0], files[1]


def test_a_converted_model_is_served_and_passes_its_check(
    tmp_path: Path, stack: LocalStack, settings: Settings
) -> None:
    """The demo model by way of LAVIS's format: its golden holds, and a worker answers with it."""
    written, matched = demo_as_lavis(tmp_path)
    convert(written, tmp_path / "opt", "demo")
    convert(matched, tmp_path / "itm", "demo")
    folders = f"{tmp_path / 'opt'}+{tmp_path / 'itm'}"
    model = Blip2.load(*folders.split("+"), dtype="float32")
    canary.check(model, read_goldens()["demo"])
    worker = start_worker(
        stack, tmp_path / "worker.log", models=f"converted={folders}", dtype="float32"
    )
    try:
        wait_for_worker(worker, settings, "converted")
        (shown,) = distinct_scenes(1)
        with Client(settings) as client:
            image = client.storage.upload(png(shown)).uri
            text = client.caption(image, model="converted").result(timeout=60).text
    finally:
        worker.stop(timeout=30)
    assert text == shown.caption
