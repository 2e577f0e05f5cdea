"""Adapters over one resident base: what PEFT computes, for each row its own."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import bitsandbytes
import pytest
import torch
from msgspec.structs import replace
from PIL import Image

from blipq_worker.blip2 import Blip2, FeatureCache, GenerateItem, RankItem
from blipq_worker.blip2.adapters.layers import AdaptedLinear, LowRank, Rows
from blipq_worker.blip2.decoding import DecodeLoop, Row
from blipq_worker.blip2.decoding.static import StaticLoop, Way, static_loop
from blipq_worker.blip2.decoding.static.attention.methods import MaskedAttention
from blipq_worker.blip2.decoding.static.linears import fused, pass_of
from blipq_worker.blip2.decoding.static.sampler import Variant
from blipq_worker.blip2.decoding.static.step import Shape
from blipq_worker.blip2.generation.routing import Loop
from blipq_worker.blip2.loading.packing import PackedLinear
from blipq_worker.catalog.adapters import read_adapter
from blipq_worker.inference.requests import GenerationParams
from worker.card import Card
from worker.in_flight import DEMO, T5_TWIN, write
from worker.lora import (
    OPT_LAYERS,
    QFORMER,
    RECIPE,
    T5_LAYERS,
    Reference,
    anew,
    of_stars,
    pictures,
    random_adapter,
    row_of,
    trained,
    up_to_its_end,
)

GREEDY = GenerationParams(num_beams=1, max_new_tokens=14)
SAMPLED = replace(GREEDY, do_sample=True, temperature=1.3)
BEAMS = GenerationParams(num_beams=4, num_return_sequences=2, max_new_tokens=14)
SEARCHED = replace(BEAMS, num_beams=3, num_return_sequences=1, length_penalty=-1.0)
PARAMS = (GREEDY, BEAMS, SEARCHED)
PROMPTS = ("", "a photo of", "Question: what color is the circle? Answer:")


class Family(NamedTuple):
    """A model with adapters, and PEFT's own of each: of none first."""

    model: Blip2
    references: list[Reference]


def _loaded(checkpoint: Path, folders: Sequence[Path]) -> Family:
    adapters = [read_adapter(str(folder)) for folder in folders]
    model = Blip2.load(str(checkpoint), dtype="float32", adapters=adapters)
    return Family(model, [Reference(checkpoint, folder) for folder in (None, *folders)])


@pytest.fixture(scope="module")
def of_opt(tmp_path_factory: pytest.TempPathFactory) -> Family:
    """By PEFT's recipe; on all layers, with another rank and scale; and on the Q-Former, too."""
    folder = tmp_path_factory.mktemp("opt")
    stars = trained(folder / "a", DEMO, of_stars)
    all_layers = random_adapter(folder / "b", DEMO, OPT_LAYERS, r=9, use_rslora=True, lora_alpha=6)
    seeing = random_adapter(folder / "c", DEMO, f"{QFORMER}|{OPT_LAYERS}", alpha_pattern={"fc1": 9})
    return _loaded(DEMO, [stars, all_layers, seeing])


@pytest.fixture(scope="module")
def of_t5(tmp_path_factory: pytest.TempPathFactory) -> Family:
    """The same of T5."""
    folder = tmp_path_factory.mktemp("t5")
    names = ("q", "v")
    one = trained(folder / "a", T5_TWIN, of_stars, rank=4, targets=names)
    all_layers = random_adapter(folder / "b", T5_TWIN, T5_LAYERS, r=7, lora_alpha=8)
    seeing = random_adapter(
        folder / "c", T5_TWIN, f"{QFORMER}|{T5_LAYERS}", use_rslora=True, lora_alpha=4
    )
    return _loaded(T5_TWIN, [one, all_layers, seeing])


@pytest.fixture(params=["of_opt", "of_t5"])
def family(request: pytest.FixtureRequest) -> Family:
    found: Family = request.getfixturevalue(request.param)
    return found


EAGER = Way(MaskedAttention, None)
#: Stands in for graphs: what it records is run again as it is.
RECORDED = Way(MaskedAttention, lambda: lambda run: run)


def growing(model: Blip2) -> Loop:
    generator = model.generator
    return DecodeLoop(generator.model.language_model, ends=generator._eos, slots=16)


def static(model: Blip2, way: Way = EAGER) -> StaticLoop:
    generator = model.generator
    loop = static_loop(
        generator.model.language_model, ends=generator._eos, slots=24, budget=0, among=[way]
    )
    assert loop is not None
    return loop


def recorded(model: Blip2) -> StaticLoop:
    return static(model, RECORDED)


LOOPS = (growing, static, recorded)


def of_all(model: Blip2, params: Sequence[GenerationParams]) -> list[tuple[Any, Row]]:
    """Rows of the base and of each adapter in turn, with their pixels."""
    found = []
    for index, picture in enumerate(pictures(2)):
        pixels = model.preprocess(picture)
        for number in range(4):
            for place, each in enumerate(params):
                prompt = PROMPTS[(index + number + place) % len(PROMPTS)]
                found.append((pixels, row_of(model, pixels, prompt, each, number, len(found))))
    return found


def texts_of(model: Blip2, rows: Sequence[Row]) -> list[list[list[int]]]:
    return [[up_to_its_end(model, each) for each in row.alternatives] for row in rows]


def written(loop: Loop, model: Blip2, rows: Sequence[Row], **options: Any) -> list[list[list[int]]]:
    fresh = [anew(row) for row in rows]
    write(loop, fresh, **options)
    return texts_of(model, fresh)


@pytest.mark.parametrize("loop", LOOPS)
def test_rows_of_all_adapters_write_together_what_peft_writes(
    family: Family, loop: Callable[[Blip2], Loop]
) -> None:
    """Greedily and with beams, token for token, beside rows of the base itself."""
    model, references = family
    some = of_all(model, PARAMS)
    expected = [references[row.adapter].tokens(model, pixels, row) for pixels, row in some]
    bases = [references[0].tokens(model, pixels, row) for pixels, row in some]
    changed = [mine != base for mine, base in zip(expected, bases, strict=True)]
    changers = {row.adapter for (_, row), each in zip(some, changed, strict=True) if each}
    assert changers == {1, 2, 3}, "an adapter changes nothing"
    assert written(loop(model), model, [row for _, row in some]) == expected


@pytest.mark.parametrize("loop", [growing, static])
def test_samples_of_an_adapter_do_not_depend_on_their_neighbours(
    family: Family, loop: Callable[[Blip2], Loop]
) -> None:
    model, same = family.model, loop(family.model)
    rows = [row for _, row in of_all(model, (SAMPLED, BEAMS))]
    alone = [written(same, model, [row])[0] for row in rows]
    assert written(same, model, rows, joining=lambda: 5) == alone


def test_a_base_with_adapters_writes_what_it_writes_without(family: Family) -> None:
    model = family.model
    checkpoint = DEMO if model.generator.family == "opt" else T5_TWIN
    plain = Blip2.load(str(checkpoint), dtype="float32")
    rows = [row for _, row in of_all(model, (SAMPLED, GREEDY, BEAMS)) if row.adapter == 0]
    for loop in (growing, static):
        assert written(loop(model), model, rows) == written(loop(plain), plain, rows)


def test_choices_are_scored_as_by_a_model_that_the_adapter_is_merged_into(
    family: Family,
) -> None:
    model, references = family
    pixels = model.preprocess(pictures(1)[0])
    choices = ("a red circle", "blue", "a green square above a red circle")
    items = [RankItem(pixels, PROMPTS, choices, number) for number in range(4)]
    together = model.rank(items)
    for number, reference in enumerate(references):
        expected = _by_teacher(model, reference, pixels, choices)
        assert together[number] == [pytest.approx(each, abs=1e-3) for each in expected]


@torch.inference_mode()
def _by_teacher(
    model: Blip2, reference: Reference, pixels: Any, choices: Sequence[str]
) -> list[list[float]]:
    """Sums of log-probabilities, one pass for each pair."""
    generator, language = model.generator, reference.model.language_model
    queries, embed = reference.queries(model, pixels), language.get_input_embeddings()
    found = []
    for prompt in PROMPTS:
        embeds = torch.cat([queries, embed(torch.tensor([generator.ids(prompt)]))], dim=1)
        sums = []
        for choice in choices:
            answer = torch.tensor([generator.answer_ids(choice)])
            if generator.family == "opt":
                whole = torch.cat([embeds, embed(answer)], dim=1)
                logits = language(inputs_embeds=whole).logits[:, embeds.shape[1] - 1 : -1]
            else:
                logits = language(inputs_embeds=embeds, labels=answer).logits
            logs = logits.log_softmax(-1).gather(-1, answer[..., None])
            sums.append(float(logs.sum()))
        found.append(sums)
    return found


def test_an_adapted_model_answers_as_its_adapter_and_the_other_as_before(family: Family) -> None:
    model = family.model
    items = [GenerateItem(model.preprocess(each), PROMPTS, GREEDY) for each in pictures(2)]
    adapted = model.adapted(1, model.info)
    own, base = adapted.generate(items), model.generate(items)
    assert own != base
    both = [*(adapted.of(item) for item in items), *items]
    assert model.generate(both) == [*own, *base]


# --- features of images ---------------------------------------------------------------------------


def test_images_are_encoded_once_for_all_but_adapters_of_the_qformer(
    tmp_path: Path, of_opt: Family
) -> None:
    folder = random_adapter(tmp_path / "text", DEMO, list(RECIPE))
    seeing = random_adapter(tmp_path / "seeing", DEMO, QFORMER)
    adapters = [read_adapter(str(each)) for each in (folder, seeing)]
    cache = FeatureCache(2**24)
    model = Blip2.load(str(DEMO), dtype="float32", cache=cache, adapters=adapters)
    views = [model, model.adapted(1, model.info), model.adapted(2, model.info)]
    passes: list[int] = []
    model.on_encode(lambda images, ms: passes.append(len(images)))

    def ask(view: Blip2) -> None:
        view.generate([GenerateItem(model.preprocess(picture, digest="d"), ("",), GREEDY)])

    (picture,) = pictures(1)
    assert [view.recall("d", ["generation"]) for view in views] == [None] * 3
    ask(views[1])
    known = [view.recall("d", ["generation"]) is not None for view in views]
    assert known == [True, True, False]
    ask(views[0])
    assert passes == [1], "an adapter of the language model has queries of its own"
    ask(views[2])
    assert passes == [1, 1]
    assert views[2].recall("d", ["generation"]) is not None
    names = {name for _, name in cache._tensors}
    assert len(names) == 2


def test_images_of_several_adapters_are_read_in_one_call(of_opt: Family) -> None:
    model, references = of_opt
    pixels = [model.preprocess(picture) for picture in pictures(4)]
    found = model.generator.project(pixels, [3, 0, 1, 3])
    for each, queries, number in zip(pixels, found, (3, 0, 1, 3), strict=True):
        (expected,) = references[number].queries(model, each)
        torch.testing.assert_close(queries, expected, atol=1e-4, rtol=1e-4)


# --- layers ---------------------------------------------------------------------------------------


def _low(rows: Rows, wide: int, out: int, owners: list[int], dtype: torch.dtype) -> LowRank:
    down, up = torch.randn(len(owners), wide) / 8, torch.randn(len(owners), out) / 8
    return LowRank(down.to(dtype), up.to(dtype), owners, rows)


def _quantized(layer: torch.nn.Linear, kind: str) -> Any:
    wide, out = layer.in_features, layer.out_features
    if kind == "packed":
        return PackedLinear(layer)
    if kind == "nf4":
        made = bitsandbytes.nn.Linear4bit(wide, out, compute_dtype=torch.float32, quant_type="nf4")
    elif kind == "int8":
        made = bitsandbytes.nn.Linear8bitLt(wide, out, has_fp16_weights=False, threshold=6.0)
    else:
        return layer
    made.load_state_dict(layer.state_dict(), strict=False)
    return made.to("cpu").requires_grad_(False)


@pytest.mark.parametrize("kind", ["plain", "packed", "nf4", "int8"])
@torch.inference_mode()
def test_each_row_gets_its_own_adapter_beside_a_layer_of_any_precision(kind: str) -> None:
    torch.manual_seed(2)
    rows, owners = Rows(loaded=True), [1, 1, 1, 2, 2, 4]
    base = _quantized(torch.nn.Linear(64, 128), kind)
    low = _low(rows, 64, 128, owners, torch.float32)
    layer, states = AdaptedLinear(base, low), torch.randn(5, 64)
    numbers = torch.tensor([0, 1, 2, 3, 4])
    plain = base(states)
    with rows.of(numbers):
        found, quick = layer(states), pass_of(layer)(states)
    for row, number in enumerate(numbers.tolist()):
        own = [at for at, owner in enumerate(owners) if owner == number]
        expected = plain[row] + (states[row] @ low.down.weight[own].T) @ low.up.weight.T[own]
        torch.testing.assert_close(found[row], expected, atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(quick[row], expected, atol=0.1, rtol=0.1)
    assert torch.equal(layer(states), plain), "outside of a pass it is the layer alone"


@pytest.mark.parametrize("kind", ["plain", "packed", "nf4", "int8"])
def test_layers_that_read_the_same_are_fused_with_their_adapters(kind: str) -> None:
    torch.manual_seed(3)
    rows = Rows(loaded=True)
    layers = [_quantized(torch.nn.Linear(64, 128), kind) for _ in range(3)]
    adapted = [
        AdaptedLinear(layers[0], _low(rows, 64, 128, [1, 1, 2], torch.float32)),
        layers[1],
        AdaptedLinear(layers[2], _low(rows, 64, 128, [2, 2], torch.float32)),
    ]
    states, numbers = torch.randn(3, 64), torch.tensor([0, 1, 2])
    with torch.inference_mode(), rows.of(numbers):
        expected = torch.cat([pass_of(layer)(states) for layer in adapted], dim=-1)
        found = fused(adapted)(states)
        torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)
        again = torch.cat([pass_of(layer)(states) for layer in adapted], dim=-1)
    torch.testing.assert_close(again, expected, atol=1e-3, rtol=1e-3)
    held = {
        part.down.weight.untyped_storage().data_ptr() for _, part in map(_parts, adapted) if part
    }
    assert len(held) == 1, "their numbers are held twice"


def _parts(layer: Any) -> tuple[Any, LowRank | None]:
    return (layer.base, layer.low) if isinstance(layer, AdaptedLinear) else (layer, None)


@torch.inference_mode()
def test_what_overflows_in_one_adapter_is_not_its_neighbours() -> None:
    rows = Rows(loaded=True)
    low = LowRank(torch.full((2, 4), 6e4).half(), torch.ones(2, 3).half(), [1, 2], rows)
    low.down.weight[1] = 0.5
    with rows.of(torch.tensor([1, 2, 0])):
        found = low(torch.zeros(3, 3).half(), torch.ones(3, 4).half())
    assert found[0].isinf().all()
    assert found[1:].tolist() == [[2.0] * 3, [0.0] * 3]


@pytest.mark.parametrize(("name", "layers"), [("opt", OPT_LAYERS), ("t5", T5_LAYERS)])
def test_a_base_in_four_bits_has_adapters_of_which_each_writes_as_alone(
    tmp_path: Path,
    checkpoints: dict[str, Path],
    pictures: list[Image.Image],
    name: str,
    layers: str,
) -> None:
    folders = [
        random_adapter(tmp_path / str(rank), checkpoints[name], layers, r=rank, lora_alpha=6)
        for rank in (3, 5)
    ]
    adapters = [read_adapter(str(folder)) for folder in folders]
    model = Blip2.load(
        str(checkpoints[name]), dtype="float32", quantization="nf4", adapters=adapters
    )
    pixels = model.preprocess(pictures[0])
    items = [GenerateItem(pixels, ("", "a photo of"), each, n) for each in PARAMS for n in range(3)]
    alone = [model.generate([item])[0] for item in items]
    assert len({str(each) for each in alone}) > 6
    assert model.generate(items) == alone


# --- nothing is waited for, and without adapters nothing is paid ---------------------------------


def test_a_step_with_adapters_takes_nothing_from_the_host(family: Family) -> None:
    step = static(family.model)._step
    with Card() as card, torch.inference_mode():
        for variant in (Variant(), Variant(True, 0), Variant(beams=5), Variant(True, 64, 5)):
            step(Shape(8, 64, variant))
    assert (card.waits, card.sent) == ([], 0)


def test_a_model_without_adapters_has_the_layers_that_it_had(demo: Blip2) -> None:
    layers = demo.generator.model.modules()
    assert not any(isinstance(layer, AdaptedLinear) for layer in layers)
