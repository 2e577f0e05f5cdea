"""Rows of all kinds, what each says alone, and how a loop runs them."""

import random
from collections.abc import Callable

import torch
from benchmarks.by_generate import hugging_face, quiet_about_penalties
from msgspec.structs import replace

from blipq_worker.blip2 import Blip2, GenerateItem, Pixels
from blipq_worker.blip2.decoding import Row, row_seed
from blipq_worker.blip2.generation.routing import Loop
from blipq_worker.inference.requests import GenerationParams
from conftest import ROOT

GREEDY = GenerationParams(num_beams=1, max_new_tokens=12, min_new_tokens=0)
SAMPLED = replace(GREEDY, do_sample=True, temperature=1.5)
WORDS = ("a", "photo of", "red", "circle", "what is", "above the", "Question: how many? Answer:")
CHAT = "Question: what is this? Answer: a cat. Question: what color is it? Answer:"
DEMO = ROOT / "worker/blipq_worker/demo/models/opt"
T5_TWIN = ROOT / "tests/models/t5"


def prompts(number: int, seed: int = 3) -> list[str]:
    """Prompts from none at all to a chat."""
    dice = random.Random(seed)
    some = [" ".join(dice.choices(WORDS, k=dice.randrange(6))) for _ in range(number)]
    return ["", CHAT, *some][:number]


def rows(model: Blip2, params: list[GenerationParams]) -> list[Row]:
    """A row for each parameters: three images in turn, and prompts of all lengths."""
    generator = model.generator
    side = model.info.image_size
    torch.manual_seed(1)
    noise = torch.randint(256, (3, side, side, 3), dtype=torch.uint8)
    images = [Pixels(pixels) for pixels in noise]
    items = [
        GenerateItem(images[index % 3], (prompt,), each)
        for index, (prompt, each) in enumerate(zip(prompts(len(params)), params, strict=True))
    ]
    return [
        Row(look, generator.checked_ids(item.prompts[0], item.params), item.params, row_seed(index))
        for index, (item, (look,)) in enumerate(zip(items, generator.seen(items), strict=True))
    ]


def every_penalty(number: int, seed: int = 5) -> list[GenerationParams]:
    """Greedy parameters of all sorts."""
    dice = random.Random(seed)
    return [
        GenerationParams(
            num_beams=1,
            max_new_tokens=(longest := dice.randint(1, 14)),
            min_new_tokens=dice.randint(0, min(5, longest)),
            repetition_penalty=dice.choice([1.0, 0.8, 1.3]),
            no_repeat_ngram_size=dice.choice([0, 0, 1, 2, 3]),
        )
        for _ in range(number)
    ]


def alone(model: Blip2, row: Row) -> list[int]:
    """A row's new tokens by transformers' ``generate``, greedily."""
    generator = model.generator
    language_model = generator.model.language_model
    prompt = language_model.get_input_embeddings()(torch.tensor(row.ids))
    embeds = torch.cat([row.queries, prompt])[None]
    with torch.inference_mode(), quiet_about_penalties():
        (written,) = language_model.generate(
            inputs_embeds=embeds,
            attention_mask=torch.ones(embeds.shape[:2], dtype=torch.long),
            eos_token_id=generator._eos,
            pad_token_id=generator._pad,
            **hugging_face(row.params),
        ).tolist()
    return written[1:] if generator.family == "t5" else written


def write(loop: Loop, todo: list[Row], *, joining: Callable[[], int] = lambda: 4) -> None:
    """Runs rows to their ends: as many as fit, or as ``joining`` says, come at each step."""
    todo = list(todo)
    while todo or loop.running:
        coming: list[Row] = []
        for _ in range(joining()):
            if todo and loop.fits(todo[0], coming):
                coming.append(todo.pop(0))
        if coming:
            loop.join(coming)
        loop.step([row for row in loop.running if not row.ended])
        loop.leave([row for row in loop.running if row.ended])
