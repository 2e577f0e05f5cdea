"""InstructBLIP: the numbers of transformers and of LAVIS, for both kinds of language models."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.by_generate import quiet_about_penalties
from PIL import Image
from safetensors.torch import load_file
from transformers import InstructBlipForConditionalGeneration, InstructBlipProcessor

from blipq.contract import ErrorCode
from blipq.errors import PermanentError
from blipq_worker.blip2 import (
    Blip2,
    CheckpointError,
    EmbedItem,
    ExplainItem,
    FeatureCache,
    GenerateItem,
    MatchItem,
    RankItem,
    RerankItem,
)
from blipq_worker.blip2.decoding import DecodeLoop
from blipq_worker.blip2.decoding.static import Way, static_loop
from blipq_worker.blip2.decoding.static.attention.methods import MaskedAttention
from blipq_worker.catalog.params import resolve
from blipq_worker.catalog.prompts import vqa_prompt
from blipq_worker.inference.requests import GenerationParams
from worker import tiny_models
from worker.conversion import lavis
from worker.in_flight import alone, every_penalty, rows, write

PROMPTS = ("", "a photo of", "Question: what is above the cat? Short answer:")
PLAIN = {"repetition_penalty": 1.0, "max_new_tokens": 8}
GREEDY = {**PLAIN, "num_beams": 1}
BEAMS = {**PLAIN, "num_beams": 5, "length_penalty": -1.0, "num_return_sequences": 2}


def items(
    model: Blip2, pictures: list[Image.Image], prompts: tuple[str, ...] = PROMPTS, **overrides: Any
) -> list[GenerateItem]:
    params = resolve("caption", model.info, overrides)
    return [GenerateItem(model.preprocess(picture), prompts, params) for picture in pictures]


def texts(model: Blip2, some: list[GenerateItem]) -> list[str]:
    answers = model.generate(some)
    return [text.text.strip() for item in answers for prompt in item for text in prompt]


class Reference:
    """transformers' own, with <image> tokens."""

    def __init__(self, folder: Path) -> None:
        self.processor = InstructBlipProcessor.from_pretrained(folder)
        self.network = InstructBlipForConditionalGeneration.from_pretrained(
            folder, dtype=torch.float32
        ).eval()
        self.is_t5 = self.network.config.text_config.model_type == "t5"
        self.processor.tokenizer.padding_side = "right" if self.is_t5 else "left"

    def inputs(self, pictures: list[Image.Image], prompts: tuple[str, ...] = PROMPTS) -> Any:
        """All prompts of each picture. The Q-Former's are padded on the right, as BERT wants."""
        return self.processor(
            images=[picture for picture in pictures for _ in prompts],
            text=list(prompts) * len(pictures),
            padding=True,
            return_tensors="pt",
        )

    def texts(self, pictures: list[Image.Image], **overrides: Any) -> list[str]:
        """Up to the tokens that end a text by the tokenizer."""
        inputs = self.inputs(pictures)
        tokenizer = self.processor.tokenizer
        written = self.network.generate(
            **inputs,
            min_new_tokens=0 if self.is_t5 else 1,
            eos_token_id=[tokenizer.eos_token_id, self.network.config.text_config.eos_token_id],
            pad_token_id=tokenizer.pad_token_id,
            **overrides,
        )
        if not self.is_t5:
            written = written[:, inputs["input_ids"].shape[1] :]
        decoded: list[str] = self.processor.batch_decode(written, skip_special_tokens=True)
        return [text.strip() for text in decoded]


@pytest.fixture
def reference(instructed: Blip2) -> Reference:
    return Reference(Path(instructed.info.checkpoint))


# --- the numbers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("overrides", [GREEDY, BEAMS])
def test_texts_equal_those_of_transformers_with_image_tokens(
    instructed: Blip2,
    reference: Reference,
    pictures: list[Image.Image],
    overrides: dict[str, Any],
) -> None:
    found = texts(instructed, items(instructed, pictures, **overrides))
    assert found == reference.texts(pictures, **overrides)
    assert len(set(found)) > 4


def test_what_the_language_model_sees_equals_that_of_transformers_and_of_lavis(
    instructed: Blip2, reference: Reference, pictures: list[Image.Image]
) -> None:
    """LAVIS's mathematics read one prompt at a time, without padding."""
    looks = instructed.generator.seen(items(instructed, pictures))
    found = torch.stack([look for each in looks for look in each])
    inputs = reference.inputs(pictures)
    with torch.no_grad():
        expected = reference.network.get_image_features(
            inputs["pixel_values"], inputs["qformer_input_ids"], inputs["qformer_attention_mask"]
        ).pooler_output
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    state = lavis.as_lavis(load_file(Path(instructed.info.checkpoint) / "model.safetensors"))
    read = iter(found)
    for picture in pictures:
        image = lavis.seen(state, lavis.pixels(picture, tiny_models.SIDE))
        for prompt in PROMPTS:
            ids = torch.tensor([reference.processor.qformer_tokenizer(prompt)["input_ids"]])
            queries = lavis.read(state, image, ids)[:, : tiny_models.QUERIES]
            own = torch.nn.functional.linear(
                queries, state["opt_proj.weight"], state["opt_proj.bias"]
            )
            torch.testing.assert_close(next(read)[None], own, atol=1e-4, rtol=1e-4)


def test_the_instruction_changes_what_is_seen(
    instructed: Blip2, pictures: list[Image.Image]
) -> None:
    ((one, other, again),) = instructed.generator.seen(
        items(instructed, pictures[:1], ("a red circle", "two cats", "a red circle"))
    )
    assert not torch.allclose(one, other, atol=1e-2)
    assert torch.equal(one, again)


@pytest.mark.parametrize("beams", [1, 3])
def test_texts_by_default_are_laviss(
    instructed: Blip2, pictures: list[Image.Image], beams: int
) -> None:
    """Its call has no ids: the repetition penalty counts what was written, and not the prompt."""
    generator = instructed.generator
    is_t5 = instructed.info.family == "t5"
    shorter = {"num_beams": beams, "max_new_tokens": 12}
    for item in items(instructed, pictures, PROMPTS[2:], **shorter):
        ((look,),) = generator.seen([item])
        embeds, mask = generator.prefix(look[None], [generator.ids(PROMPTS[2])])
        with torch.inference_mode(), quiet_about_penalties():
            written = generator.model.language_model.generate(
                inputs_embeds=embeds,
                attention_mask=mask,
                do_sample=False,
                repetition_penalty=1.5,
                min_new_tokens=0 if is_t5 else 1,
                eos_token_id=generator._eos,
                pad_token_id=generator._pad,
                **shorter,
            )
        expected = generator.text(written[0].tolist()[1 if is_t5 else 0 :])
        (((found,),),) = instructed.generate([item])
        assert (found.text, found.tokens) == (expected.text, expected.tokens)


def test_a_batch_of_mixed_prompts_equals_one_at_a_time(
    instructed: Blip2, pictures: list[Image.Image]
) -> None:
    for overrides in (GREEDY, BEAMS):
        batch = items(instructed, pictures, **overrides)
        apart = [
            text
            for picture in pictures
            for prompt in PROMPTS
            for text in texts(instructed, items(instructed, [picture], (prompt,), **overrides))
        ]
        assert texts(instructed, batch) == apart


def test_likelihoods_of_choices_equal_those_of_one_pass_over_each(
    instructed: Blip2, reference: Reference, pictures: list[Image.Image]
) -> None:
    choices = ("a red circle", "no", "two cats on the left of the square")
    asked = [RankItem(instructed.preprocess(each), PROMPTS[1:], choices) for each in pictures[:2]]
    found = [number for item in instructed.rank(asked) for row in item for number in row]
    expected = []
    for picture in pictures[:2]:
        for prompt in PROMPTS[1:]:
            inputs = reference.inputs([picture], (prompt,))
            expected += [_likelihood(reference, dict(inputs), choice) for choice in choices]
    assert found == pytest.approx(expected, rel=1e-4)


def _likelihood(reference: Reference, inputs: dict[str, Any], choice: str) -> float:
    tokenizer = reference.processor.tokenizer
    spoken = tokenizer(choice, add_special_tokens=False)["input_ids"]
    answer = torch.tensor([[*spoken, tokenizer.eos_token_id]])
    with torch.no_grad():
        if reference.is_t5:
            logits = reference.network(**inputs, labels=answer).logits[0]
        else:
            ids = torch.cat([inputs["input_ids"], answer], dim=1)
            inputs |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            logits = reference.network(**inputs).logits[0, -answer.shape[1] - 1 : -1]
    return float(logits.log_softmax(dim=-1).gather(-1, answer[0][:, None]).sum())


# --- Llama's slots --------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_llama_whose_heads_share_keys_writes_what_generate_writes(
    tmp_path: Path, attention: Any
) -> None:
    folder = tiny_models.save_instructed_llama(tmp_path / "shared", sharing=2)
    model = Blip2.load(str(folder), dtype="float32", attention=attention)
    some = rows(model, every_penalty(12))
    expected = [alone(model, row) for row in some]
    assert len({tuple(tokens) for tokens in expected}) > 6
    assert in_growing_slots(model, some) == expected
    assert in_static_slots(model, some) == expected


@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_quantized_weights_write_what_they_write_with_generate(
    instructed_checkpoints: dict[str, Path], quantization: Any
) -> None:
    """A row alone: int8 rounds it by the largest numbers of all."""
    for folder in instructed_checkpoints.values():
        model = Blip2.load(str(folder), quantization=quantization, dtype="float32")
        some = rows(model, every_penalty(3))
        expected = [alone(model, row) for row in some]
        assert in_growing_slots(model, some, slots=1) == expected
        static = in_static_slots(model, some, slots=1)  # which open where scores are near to these
        if quantization == "nf4":  # of a norm's last bit, which is another, 8 bits make a 127th
            assert static == expected


def test_bfloat16_writes_what_it_writes_alone_with_generate(
    instructed_checkpoints: dict[str, Path],
) -> None:
    model = Blip2.load(str(instructed_checkpoints["llama"]), dtype="bfloat16")
    some = rows(model, every_penalty(6))
    assert in_growing_slots(model, some, slots=1) == [alone(model, row) for row in some]


def test_sixteen_bits_and_quantized_weights_write_about_every_picture(
    instructed_checkpoints: dict[str, Path], pictures: list[Image.Image]
) -> None:
    for folder in instructed_checkpoints.values():
        model = Blip2.load(str(folder), dtype="bfloat16", quantization="nf4")
        assert all(texts(model, items(model, pictures, max_new_tokens=4)))


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_parts_have_the_precision_of_their_kind(
    instructed_checkpoints: dict[str, Path], quantization: Any
) -> None:
    """The angles of Llama's positions stay fp32: in bf16 those of far tokens would be others."""
    folder = str(instructed_checkpoints["llama"])
    model = Blip2.load(folder, dtype="bfloat16", quantization=quantization).generator.model
    exact = Blip2.load(folder, dtype="float32").generator.model
    assert {each.dtype for each in model.qformer.parameters()} == {torch.float32}
    assert model.query_tokens.dtype == torch.float32
    assert model.vision_model.embeddings.class_embedding.dtype == torch.bfloat16
    assert model.language_model.model.norm.weight.dtype == torch.bfloat16
    angles = (each.language_model.model.rotary_emb.inv_freq for each in (model, exact))
    assert torch.equal(*angles)


def in_growing_slots(model: Blip2, some: list[Any], slots: int = 3) -> list[list[int]]:
    generator = model.generator
    language_model = generator.model.language_model
    return _written(DecodeLoop(language_model, ends=generator._eos, slots=slots), some)


def in_static_slots(model: Blip2, some: list[Any], slots: int = 3) -> list[list[int]]:
    generator = model.generator
    loop = static_loop(
        generator.model.language_model,
        ends=generator._eos,
        slots=slots,
        budget=0,
        among=[Way(MaskedAttention, lambda: lambda run: run)],
    )
    assert loop is not None
    return _written(loop, some)


def _written(loop: Any, some: list[Any]) -> list[list[int]]:
    fresh = [type(row)(row.queries, row.ids, row.params, row.seed) for row in some]
    write(loop, fresh)
    return [row.tokens for row in fresh]


def test_graphs_of_the_start_are_those_that_default_jobs_need(
    instructed: Blip2, pictures: list[Image.Image]
) -> None:
    model = Blip2.load(instructed.info.checkpoint, dtype="float32")
    model.open_slots([Way(MaskedAttention, lambda: lambda run: run)], slots=8, budget=0)
    loop: Any = model.generator._static
    captured = set(loop._run._replays)
    assert {shape.variant.penalties for shape in captured} == {True}
    assert {shape.variant.penalties for shape in loop._admit._recorded} == {True}
    for beams in (1, 5):
        model.generate(items(model, pictures, ("a photo of",), num_beams=beams, max_new_tokens=9))
    assert set(loop._run._replays) == captured


def test_a_caption_of_default_length_fits_a_static_slot(
    instructed: Blip2, pictures: list[Image.Image]
) -> None:
    model = Blip2.load(instructed.info.checkpoint, dtype="float32")
    model.open_slots([Way(MaskedAttention, None)], slots=4, budget=0)
    assert model.static_slots == 4
    (item,) = items(model, pictures[:1], ("a photo of",), num_beams=1)
    session: Any = model.session()
    session.join((0, 0), item)
    session.step([(0, 0)])
    (row,) = session._loop.running
    assert row.params.max_new_tokens == 256
    assert row in session._loop._static
    session.close()


# --- what is remembered ---------------------------------------------------------------------------


@contextmanager
def passes(model: Blip2) -> Iterator[tuple[list[int], list[int]]]:
    """Images that the tower looks at, and pairs that the Q-Former reads, pass by pass."""
    looked: list[int] = []
    read: list[int] = []
    network = model.generator.model
    hooks = [
        network.vision_model.register_forward_hook(
            lambda module, inputs, output: looked.append(len(output.last_hidden_state))
        ),
        network.qformer.register_forward_hook(
            lambda module, inputs, output: read.append(len(output.last_hidden_state))
        ),
    ]
    yield looked, read
    for hook in hooks:
        hook.remove()


@pytest.fixture
def cached(instructed: Blip2) -> Blip2:
    return Blip2.load(instructed.info.checkpoint, dtype="float32", cache=FeatureCache(2**24))


def about(model: Blip2, pixels: Any, *prompts: str) -> GenerateItem:
    return GenerateItem(pixels, prompts, resolve("caption", model.info, {"max_new_tokens": 3}))


def test_a_picture_is_looked_at_once_whatever_is_asked_about_it(
    cached: Blip2, pictures: list[Image.Image]
) -> None:
    first = about(cached, cached.preprocess(pictures[0], digest="a"), "a", "two cats")
    other = about(cached, cached.preprocess(pictures[1], digest="b"), "a")
    with passes(cached) as (looked, read):
        cached.generate([first, other])
        assert (looked, read) == ([2], [3]), "all of them in one pass"
        again = about(cached, cached.preprocess(pictures[0], digest="a"), "two cats")
        assert texts(cached, [again])[0] == texts(cached, [first])[1]
        assert (looked, read) == ([2], [3]), "and the queries of a prompt are known"
        pixels = cached.recall("a", ["generation"])
        assert pixels is not None
        assert pixels.generation is None, "no pixels are needed for another prompt"
        new = texts(cached, [about(cached, pixels, "a red circle")])
        assert (looked, read) == ([2], [3, 1])
    plain = about(cached, cached.preprocess(pictures[0]), "a red circle")
    assert texts(cached, [plain]) == new


def test_what_is_known_of_a_picture_is_forgotten_with_all_its_prompts(
    cached: Blip2, pictures: list[Image.Image]
) -> None:
    cached.generate([about(cached, cached.preprocess(pictures[0], digest="a"), "a", "two")])
    cached.forget({"a"})
    assert cached.recall("a", ["generation"]) is None
    assert cached._cache is not None
    assert (len(cached._cache), cached._cache.bytes) == (0, 0)


def test_equal_prompts_about_one_picture_are_read_once(
    instructed: Blip2, pictures: list[Image.Image]
) -> None:
    with passes(instructed) as (looked, read):
        instructed.generate([about(instructed, instructed.preprocess(pictures[0]), "a", "a", "b")])
    assert (looked, read) == ([1], [2])


def test_the_time_of_a_look_is_reported_for_the_pictures_that_waited(
    instructed: Blip2, pictures: list[Image.Image]
) -> None:
    waited: list[int] = []
    model = Blip2.load(instructed.info.checkpoint, dtype="float32", cache=FeatureCache(2**24))
    model.on_encode(lambda images, ms: waited.append(len(images)))
    item = about(model, model.preprocess(pictures[0], digest="a"), "a", "b")
    other = about(model, model.preprocess(pictures[1], digest="b"), "a")
    model.generate([item, other])
    assert waited == [2]
    model.generate([item, other, about(model, item.pixels, "another prompt")])
    assert waited == [2], "another prompt does not wait for the tower"


def test_looks_by_graphs_are_those_without(instructed: Blip2, pictures: list[Image.Image]) -> None:
    expected = instructed.generator.seen(items(instructed, pictures))
    model = Blip2.load(instructed.info.checkpoint, dtype="float32")
    model.generator.vision.capture(lambda run: run, most=4)
    found = model.generator.seen(items(model, pictures))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(torch.stack(one), torch.stack(other), atol=1e-5, rtol=1e-5)


# --- what is asked and refused --------------------------------------------------------------------


def test_of_a_long_instruction_the_qformer_reads_the_end(instructed: Blip2) -> None:
    """As LAVIS cuts it; here at the 64 positions of the tiny Q-Former."""
    instructions = instructed.generator._instructions
    assert instructions is not None
    short, long = (instructions.ids(text) for text in ("a cat", "red " * 200 + "a cat"))
    assert (len(long), long[0], long[-3:]) == (64, short[0], short[-3:])


def test_defaults_are_those_of_lavis_for_instructblip(instructed: Blip2) -> None:
    is_t5 = instructed.info.family == "t5"
    assert instructed.info.default_prompt == "A short image description:"
    assert resolve("caption", instructed.info) == GenerationParams(
        max_new_tokens=256, min_new_tokens=0 if is_t5 else 1, num_beams=5, repetition_penalty=1.5
    )
    assert resolve("vqa", instructed.info) == GenerationParams(
        max_new_tokens=10,
        min_new_tokens=0 if is_t5 else 1,
        num_beams=5,
        repetition_penalty=1.5,
        length_penalty=-1.0 if is_t5 else 0.0,
    )


def test_a_chat_is_a_prompt_like_any_other(instructed: Blip2, pictures: list[Image.Image]) -> None:
    prompt = vqa_prompt("is it red?", [("what is this?", "a cat")])
    (item,) = items(instructed, pictures[:1], (prompt,), max_new_tokens=4)
    instructed.check(item)
    ((found,),) = instructed.generate([item])
    assert found[0].tokens <= 4


def test_what_needs_a_retrieval_checkpoint_is_refused_with_its_code(
    instructed: Blip2, pictures: list[Image.Image]
) -> None:
    pixels = instructed.preprocess(pictures[0])
    refused: list[tuple[Any, Any]] = [
        (instructed.match, MatchItem(pixels, ("a cat",))),
        (instructed.explain, ExplainItem(pixels, ("a cat",))),
        (instructed.rerank, RerankItem(pixels, "a cat")),
        (instructed.embed, EmbedItem("image", pixels)),
    ]
    for run, item in refused:
        for call in (
            lambda run=run, item=item: run([item]),
            lambda item=item: instructed.check(item),
        ):
            with pytest.raises(PermanentError, match="no retrieval checkpoint") as caught:
                call()
            assert caught.value.code == ErrorCode.MODEL_UNAVAILABLE


def test_a_llama_begins_and_ends_texts_as_its_tokenizer_says(instructed_llama: Blip2) -> None:
    generator = instructed_llama.generator
    assert generator.ids("a </s> b")[0] == 2
    assert generator.ids("a </s> b").count(2) == 1, "in a prompt it is plain text"
    assert generator._eos == [2, 1]
    assert generator.answer_ids("no")[-1] == 2
    assert generator.text([2, 5]).tokens == 1


def test_a_checkpoint_without_the_qformers_tokenizer_is_refused(
    instructed_checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(instructed_checkpoints["t5"], tmp_path / "copy"))
    shutil.rmtree(folder / "qformer_tokenizer")
    with pytest.raises(CheckpointError, match=r"no usable tokenizer in .*qformer_tokenizer"):
        Blip2.load(str(folder), dtype="float32")


def test_a_llama_whose_positions_depend_on_the_length_of_a_text_is_refused(
    instructed_checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(instructed_checkpoints["llama"], tmp_path / "copy"))
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["rope_parameters"] = {
        "rope_type": "dynamic",
        "factor": 2.0,
        "rope_theta": 10000.0,
    }
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="unsupported positions 'dynamic'"):
        Blip2.load(str(folder), dtype="float32")
