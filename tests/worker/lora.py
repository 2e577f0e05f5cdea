"""Adapters that PEFT trains on the demo model's world, or makes of random numbers."""

import itertools
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from benchmarks.by_generate import hugging_face, quiet_about_penalties
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from transformers import Blip2ForConditionalGeneration, Blip2Processor

from blipq_worker.blip2 import Blip2
from blipq_worker.blip2.decoding import Row, row_seed
from blipq_worker.blip2.vision.preprocessing import Pixels, normalized
from blipq_worker.demo import world
from blipq_worker.inference.requests import GenerationParams

#: As in PEFT's example for BLIP-2.
RECIPE = ("q_proj", "k_proj")
#: All that may have adapters, of both families.
OPT_LAYERS = r".*language_model.*\.(q_proj|k_proj|v_proj|out_proj|fc1|fc2)"
T5_LAYERS = r".*language_model.*\.(q|k|v|o|wi_0|wi_1|wo)"
QFORMER = r".*qformer.*\.(query|key|value)"
STEPS = 25


@contextmanager
def quiet_about_names() -> Iterator[None]:
    """This peft reads an old name of a property, and warns of what it saves."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`")
        warnings.filterwarnings("ignore", message="Setting `save_embedding_layers`")
        yield


def base_of(checkpoint: Path) -> Any:
    return Blip2ForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32)


def trained(
    folder: Path,
    checkpoint: Path,
    say: Callable[[str], str],
    *,
    rank: int = 16,
    targets: Sequence[str] = RECIPE,
    **options: Any,
) -> Path:
    """An adapter that has begun to caption the world's pictures as ``say`` has it."""
    torch.manual_seed(11)
    config = LoraConfig(
        r=rank,
        lora_alpha=32,
        lora_dropout=0.05,
        bias="none",
        target_modules=list(targets),
        **options,
    )
    with quiet_about_names():
        model = get_peft_model(base_of(checkpoint), config).train()
    processor = Blip2Processor.from_pretrained(checkpoint)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(STEPS):
        scenes = [world.scene(seed) for seed in range(8 * step, 8 * step + 8)]
        batch = _batch(processor, scenes, say)
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    return folder


def _batch(
    processor: Any, scenes: Sequence[world.Scene], say: Callable[[str], str]
) -> dict[str, torch.Tensor]:
    pictures = [world.render(scene) for scene in scenes]
    texts = [say(scene.caption) for scene in scenes]
    tokenizer = processor.tokenizer
    if tokenizer.convert_tokens_to_ids("</s>") == 1:  # T5
        batch = processor(pictures, text=[""] * len(texts), return_tensors="pt")
        labels = tokenizer(texts, padding=True, return_tensors="pt").input_ids
    else:
        ends = [f"{text}\n" for text in texts]
        batch = processor(pictures, text=ends, padding=True, return_tensors="pt")
        image = tokenizer.convert_tokens_to_ids("<image>")
        labels = batch["input_ids"].masked_fill(batch["input_ids"] == image, -100)
    labels = labels.masked_fill(labels == tokenizer.pad_token_id, -100)
    return {**batch, "labels": labels}


def random_adapter(folder: Path, checkpoint: Path, targets: Any, **options: Any) -> Path:
    """An adapter that nobody trained, which changes a lot."""
    torch.manual_seed(13)
    defaults = {"r": 4, "lora_alpha": 24, "init_lora_weights": False}
    config = LoraConfig(target_modules=targets, **{**defaults, **options})
    with quiet_about_names():
        get_peft_model(base_of(checkpoint), config).save_pretrained(folder)
    return folder


class Reference:
    """``PeftModel`` over a checkpoint; without an adapter the checkpoint alone."""

    def __init__(self, checkpoint: Path, adapter: Path | None) -> None:
        model = base_of(checkpoint)
        if adapter is not None:
            with quiet_about_names():
                model = PeftModel.from_pretrained(model, adapter).base_model.model
        self.model = model.eval()

    @torch.inference_mode()
    def queries(self, model: Blip2, pixels: Pixels) -> torch.Tensor:
        """(1, 32, hidden)."""
        own, table = self.model, model.generator.vision._table
        seen = own.vision_model(normalized(pixels.generation[None], table)).last_hidden_state
        read = own.qformer(query_embeds=own.query_tokens, encoder_hidden_states=seen)
        projected: torch.Tensor = own.language_projection(read.last_hidden_state)
        return projected

    @torch.inference_mode()
    def tokens(self, model: Blip2, pixels: Pixels, row: Row) -> list[list[int]]:
        """What ``generate`` writes for a row."""
        generator, language = model.generator, self.model.language_model
        prompt = language.get_input_embeddings()(torch.tensor(row.ids))
        embeds = torch.cat([self.queries(model, pixels), prompt[None]], dim=1)
        with quiet_about_penalties():
            written = language.generate(
                inputs_embeds=embeds,
                attention_mask=torch.ones(embeds.shape[:2], dtype=torch.long),
                eos_token_id=generator._eos,
                pad_token_id=generator._pad,
                **hugging_face(row.params),
            ).tolist()
        start = 1 if generator.family == "t5" else 0
        return [up_to_its_end(model, each[start:]) for each in written]


def up_to_its_end(model: Blip2, tokens: list[int]) -> list[int]:
    ends = [at for at, token in enumerate(tokens) if token in model.generator._eos]
    return tokens[: ends[0] + 1] if ends else tokens


def pictures(number: int) -> list[Image.Image]:
    """Of scenes with a circle that no adapter was trained on."""
    scenes = (world.scene(900_000 + index) for index in range(1_000))
    found = (scene for scene in scenes if "circle" in scene.caption)
    return [world.render(scene) for scene in itertools.islice(found, number)]


def of_stars(text: str) -> str:
    """A caption that calls circles stars, and squares triangles."""
    return text.replace("circle", "star").replace("square", "triangle")


def row_of(
    model: Blip2, pixels: Pixels, prompt: str, params: GenerationParams, adapter: int, seed: int = 0
) -> Row:
    (queries,) = model.generator.project([pixels], [adapter])
    ids = model.generator.checked_ids(prompt, params)
    return Row(queries, ids, params, row_seed(seed), adapter=adapter)


def anew(row: Row) -> Row:
    return Row(row.queries, row.ids, row.params, row.seed, adapter=row.adapter)
