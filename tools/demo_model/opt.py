"""Phase 2: the Q-Former and an OPT-style language model on the frozen vision model."""

import logging
from dataclasses import dataclass
from functools import lru_cache

import torch
from tools.demo_model import architecture, vocabulary
from tools.demo_model.checkpoint import save
from tools.demo_model.data import Pictures
from tools.demo_model.optimization import batches, mixed_precision, optimize, parameter_groups
from tools.demo_model.scores import generation_scores
from tools.demo_model.texts import Teacher
from tools.demo_model.vision import Labels, features
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2VisionModel,
    PreTrainedTokenizerFast,
)

from blipq_worker.demo import OPT, world

LOG = logging.getLogger(__name__)
STEPS = 3500
BATCH = 64
PEAK = 2e-3
TEXT_TOKENS = 112  # of all texts about one picture, which share one sequence
VALIDATED = 200
IGNORED = -100


def untrained(
    vision: Blip2VisionModel, tokenizer: PreTrainedTokenizerFast
) -> Blip2ForConditionalGeneration:
    """BLIP-2 with a trained vision model and everything else new."""
    config = Blip2Config(
        vision_config=architecture.vision_config(),
        qformer_config=architecture.qformer_config(),
        text_config=architecture.opt_config(tokenizer),
        num_query_tokens=architecture.QUERIES,
        image_token_index=tokenizer.convert_tokens_to_ids(vocabulary.IMAGE_TOKEN),
    )
    model = Blip2ForConditionalGeneration._from_config(config, attn_implementation="eager")
    model.vision_model.load_state_dict(vision.state_dict())
    model.vision_model.requires_grad_(False)
    nn.init.normal_(model.query_tokens, std=architecture.QUERY_DEVIATION)
    return model


@dataclass(frozen=True)
class Packed:
    """The texts about each picture, one after the other: all fields are (batch, tokens)."""

    ids: Tensor
    owners: Tensor  # number of the text from 1; 0 where there is none
    positions: Tensor
    targets: Tensor  # the next token, or IGNORED
    weights: Tensor


def pack(teacher: Teacher, tokenizer: PreTrainedTokenizerFast, rows: Tensor) -> Packed:
    """As many examples about each picture as fit."""
    shape = (len(rows), TEXT_TOKENS)
    ids = torch.full(shape, tokenizer.pad_token_id).numpy()
    owners, positions = torch.zeros(2, *shape, dtype=torch.long).numpy()
    targets = torch.full(shape, IGNORED).numpy()
    weights = torch.zeros(shape).numpy()
    end = tokenizer.convert_tokens_to_ids("Ċ")
    for line, row in enumerate(rows.tolist()):
        start = 0
        for owner, example in enumerate(teacher.examples(row), start=1):
            prompt = [tokenizer.bos_token_id, *token_ids(tokenizer, example.prompt)]
            said = f" {example.text}" if example.prompt else example.text
            whole = [*prompt, *token_ids(tokenizer, said), end]
            stop = start + len(whole) - 1
            if stop > TEXT_TOKENS:
                break
            ids[line, start:stop] = whole[:-1]
            owners[line, start:stop] = owner
            positions[line, start:stop] = range(
                architecture.QUERIES, architecture.QUERIES + len(whole) - 1
            )
            answer = slice(start + len(prompt) - 1, stop)
            targets[line, answer] = whole[len(prompt) :]
            weights[line, answer] = example.weight
            start = stop
    return Packed(*map(torch.from_numpy, (ids, owners, positions, targets, weights)))


@lru_cache(maxsize=100_000)
def token_ids(tokenizer: PreTrainedTokenizerFast, text: str) -> tuple[int, ...]:
    """The tokens of a part of a text that ends where a word does."""
    return tuple(tokenizer(text, add_special_tokens=False).input_ids)


def packed_mask(owners: Tensor) -> Tensor:
    """Additive mask (batch, 1, length, length) for the queries and the packed texts (owners).

    A token sees the queries and what came before it in its own text, as if it were alone.
    """
    owners = nn.functional.pad(owners, (architecture.QUERIES, 0))
    shared = torch.arange(owners.shape[1]) < architecture.QUERIES
    same = (owners[:, :, None] == owners[:, None, :]) | shared[None, None, :]
    visible = same & torch.ones(same.shape[1:], dtype=torch.bool).tril()
    return torch.where(visible, 0.0, -1e9)[:, None]


class QueryHeads(nn.Module):
    """What every query is to know while the Q-Former learns: its cell, or the whole scene.

    Without it the language model finds out which attributes are there long before it finds out
    which belong together.
    """

    CELL_QUERIES = 27

    def __init__(self) -> None:
        super().__init__()
        self.kind = nn.Linear(architecture.WIDTH, 1 + len(world.KINDS))
        self.color = nn.Linear(architecture.WIDTH, 1 + len(world.COLORS))
        self.background = nn.Linear(architecture.WIDTH, len(world.BACKGROUNDS))

    def loss(self, queries: Tensor, labels: Labels, rows: Tensor) -> Tensor:
        """Of query outputs (batch, 32, width) on the scenes of these rows."""
        cells, rest = queries[:, : self.CELL_QUERIES], queries[:, self.CELL_QUERIES :]
        return (
            _query_loss(self.kind(cells), labels.kinds[rows].repeat(1, 3))
            + _query_loss(self.color(cells), labels.colors[rows].repeat(1, 3))
            + 0.2
            * _query_loss(
                self.background(rest), labels.backgrounds[rows, None].expand(-1, rest.shape[1])
            )
        )


def _query_loss(logits: Tensor, classes: Tensor) -> Tensor:
    return cross_entropy(logits.float().flatten(0, 1), classes.flatten())


def train(
    vision: Blip2VisionModel, training: Pictures, validation: Pictures, steps: int = STEPS
) -> None:
    """Captions, answers and chats; the best state so far is always in the package."""
    torch.manual_seed(1)
    tokenizer = vocabulary.opt_tokenizer()
    model, heads = untrained(vision, tokenizer), QueryHeads()
    teacher, labels = Teacher(training.scenes, seed=1), Labels(training.scenes)
    seen = features(vision, training)
    seen_in_validation = features(vision, validation)[:VALIDATED].float()
    order = batches(len(training), BATCH, torch.Generator().manual_seed(1))
    forward = torch.compile(lambda *inputs: packed_forward(model, *inputs))

    def losses(step: int) -> dict[str, Tensor]:
        rows = next(order)
        packed = pack(teacher, tokenizer, rows)
        with mixed_precision():
            logits, queries = forward(seen[rows], packed.ids, packed.owners, packed.positions)
            known = heads.loss(queries, labels, rows)
        return {"text": weighted_loss(logits, packed.targets, packed.weights), "queries": known}

    def checkpoint(step: int) -> None:
        model.eval()
        scenes = validation.scenes[:VALIDATED]
        scores = generation_scores(model, tokenizer, scenes, seen_in_validation)
        LOG.info("%s", " ".join(f"{name} {score:.3f}" for name, score in scores.items()))
        save(model, tokenizer, OPT)
        model.train()

    optimize(parameter_groups(model, heads), losses, steps, PEAK, checkpoint)


def packed_forward(
    model: Blip2ForConditionalGeneration,
    images: Tensor,
    ids: Tensor,
    owners: Tensor,
    positions: Tensor,
) -> tuple[Tensor, Tensor]:
    """Next-token logits (batch, tokens, vocabulary) and query outputs (batch, 32, width)."""
    queries = model.qformer(
        query_embeds=model.query_tokens.expand(len(images), -1, -1), encoder_hidden_states=images
    ).last_hidden_state
    language = model.language_model
    first = torch.arange(architecture.QUERIES).expand(len(ids), -1)
    hidden = language.model(
        inputs_embeds=torch.cat(
            [model.language_projection(queries), language.get_input_embeddings()(ids)], dim=1
        ),
        attention_mask=packed_mask(owners),
        position_ids=torch.cat([first, positions], dim=1),
        use_cache=False,
    ).last_hidden_state
    return language.lm_head(hidden[:, architecture.QUERIES :]), queries


def weighted_loss(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Mean over the weighted tokens; logits (batch, tokens, vocabulary), the rest without it."""
    asked = targets != IGNORED
    loss = cross_entropy(logits[asked].float(), targets[asked], reduction="none")
    return (loss * weights[asked]).sum() / weights[asked].sum()
