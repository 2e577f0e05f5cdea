"""Phase 4: the twin, with an encoder-decoder in the style of Flan-T5 behind the same Q-Former."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from tools.demo_model import architecture, vocabulary
from tools.demo_model.checkpoint import save
from tools.demo_model.data import Pictures
from tools.demo_model.opt import IGNORED, token_ids, weighted_loss
from tools.demo_model.optimization import batches, mixed_precision, optimize, parameter_groups
from tools.demo_model.scores import generation_scores
from tools.demo_model.texts import Example, Teacher
from tools.demo_model.vision import features
from torch import Tensor, nn
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2VisionModel,
    PreTrainedTokenizerFast,
)

from blipq_worker.demo import OPT

LOG = logging.getLogger(__name__)
FOLDER = Path("tests/models/t5")
STEPS = 700
BATCH = 32
TEXTS = 6  # about each picture
PEAK = 1.5e-3
PROMPT_TOKENS = 32
ANSWER_TOKENS = 12
VALIDATED = 200
EMBEDDING_DEVIATION = 0.5


def untrained(
    language: Blip2ForConditionalGeneration, tokenizer: PreTrainedTokenizerFast
) -> Blip2ForConditionalGeneration:
    """Everything up to the queries' outputs as in the OPT model, and frozen; the rest is new."""
    config = Blip2Config(
        vision_config=architecture.vision_config(),
        qformer_config=architecture.qformer_config(),
        text_config=architecture.t5_config(tokenizer),
        num_query_tokens=architecture.QUERIES,
        image_token_index=tokenizer.convert_tokens_to_ids(vocabulary.IMAGE_TOKEN),
    )
    model = Blip2ForConditionalGeneration._from_config(config, attn_implementation="eager")
    for part in ("vision_model", "qformer"):
        getattr(model, part).load_state_dict(getattr(language, part).state_dict())
        getattr(model, part).requires_grad_(False)
    model.query_tokens.data.copy_(language.query_tokens.data)
    model.query_tokens.requires_grad_(False)
    # The embeddings are tied to the output, so a single scaling reaches both.
    nn.init.normal_(model.language_model.shared.weight, std=EMBEDDING_DEVIATION)
    nn.init.normal_(
        model.language_projection.weight, std=EMBEDDING_DEVIATION / architecture.WIDTH**0.5
    )
    return model


@dataclass(frozen=True)
class Paired:
    """Prompts and answers, TEXTS for each picture; all fields are (texts, tokens)."""

    ids: Tensor
    mask: Tensor
    decoder_ids: Tensor
    targets: Tensor
    weights: Tensor


def pair(teacher: Teacher, tokenizer: PreTrainedTokenizerFast, rows: Tensor) -> Paired:
    """Examples about the pictures of these rows, without those that are too long."""
    count = len(rows) * TEXTS
    ids = torch.zeros(count, PROMPT_TOKENS, dtype=torch.long).numpy()
    decoder_ids = torch.zeros(count, ANSWER_TOKENS, dtype=torch.long).numpy()
    targets = torch.full((count, ANSWER_TOKENS), IGNORED).numpy()
    weights = torch.zeros(count, ANSWER_TOKENS).numpy()
    end = tokenizer.eos_token_id
    lines = (
        (example.weight, prompt, [*token_ids(tokenizer, example.text), end])
        for row in rows.tolist()
        for example, prompt in islice(_short(teacher, tokenizer, row), TEXTS)
    )
    for line, (weight, prompt, answer) in enumerate(lines):
        ids[line, : len(prompt)] = prompt
        decoder_ids[line, 1 : len(answer)] = answer[:-1]
        targets[line, : len(answer)] = answer
        weights[line, : len(answer)] = weight
    prompts = torch.from_numpy(ids)
    mask = (prompts != tokenizer.pad_token_id).long()
    return Paired(prompts, mask, *map(torch.from_numpy, (decoder_ids, targets, weights)))


def _short(
    teacher: Teacher, tokenizer: PreTrainedTokenizerFast, row: int
) -> Iterator[tuple[Example, list[int]]]:
    for example in teacher.examples(row):
        prompt = [*token_ids(tokenizer, example.prompt), tokenizer.eos_token_id]
        if len(prompt) <= PROMPT_TOKENS:
            yield example, prompt


def train(
    vision: Blip2VisionModel, training: Pictures, validation: Pictures, steps: int = STEPS
) -> None:
    """The language model and its projection only."""
    torch.manual_seed(3)
    tokenizer = vocabulary.t5_tokenizer()
    language = Blip2ForConditionalGeneration.from_pretrained(OPT, dtype=torch.float32)
    model = untrained(language, tokenizer)
    teacher = Teacher(training.scenes, seed=3)
    seen = features(vision, training)
    seen_in_validation = features(vision, validation)[:VALIDATED].float()
    order = batches(len(training), BATCH, torch.Generator().manual_seed(3))
    forward = torch.compile(lambda *inputs: paired_logits(model, *inputs))

    def losses(step: int) -> dict[str, Tensor]:
        rows = next(order)
        texts = pair(teacher, tokenizer, rows)
        with mixed_precision():
            logits = forward(seen[rows], texts.ids, texts.mask, texts.decoder_ids)
        return {"text": weighted_loss(logits, texts.targets, texts.weights)}

    def checkpoint(step: int) -> None:
        model.eval()
        scenes = validation.scenes[:VALIDATED]
        scores = generation_scores(model, tokenizer, scenes, seen_in_validation)
        LOG.info("%s", " ".join(f"{name} {score:.3f}" for name, score in scores.items()))
        save(model, tokenizer, FOLDER)
        model.train()

    optimize(parameter_groups(model), losses, steps, PEAK, checkpoint, every=100)


def paired_logits(
    model: Blip2ForConditionalGeneration,
    images: Tensor,
    ids: Tensor,
    mask: Tensor,
    decoder_ids: Tensor,
) -> Tensor:
    """Logits (texts, answer tokens, vocabulary) for TEXTS prompts about each picture."""
    with torch.no_grad():
        queries = model.qformer(
            query_embeds=model.query_tokens.expand(len(images), -1, -1),
            encoder_hidden_states=images,
        ).last_hidden_state
    prefix = model.language_projection(queries).repeat_interleave(TEXTS, dim=0)
    embedded = model.language_model.get_input_embeddings()(ids)
    return model.language_model(
        inputs_embeds=torch.cat([prefix, embedded], dim=1),
        attention_mask=nn.functional.pad(mask, (architecture.QUERIES, 0), value=1),
        decoder_input_ids=decoder_ids,
        use_cache=False,
    ).logits
