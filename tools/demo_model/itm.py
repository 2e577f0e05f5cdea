"""Phase 3: image-text matching and retrieval on the same frozen vision model."""

import logging
import random
from dataclasses import dataclass

import torch
from tools.demo_model import architecture, vocabulary
from tools.demo_model.checkpoint import save
from tools.demo_model.data import Pictures
from tools.demo_model.opt import QueryHeads
from tools.demo_model.optimization import batches, mixed_precision, optimize, parameter_groups
from tools.demo_model.scores import matching_scores
from tools.demo_model.vision import Labels, features
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize
from transformers import (
    Blip2Config,
    Blip2ForImageTextRetrieval,
    Blip2VisionModel,
    PreTrainedTokenizerFast,
)

from blipq_worker.demo import ITM, world

LOG = logging.getLogger(__name__)
STEPS = 3000
BATCH = 64
PEAK = 1.5e-3
TEXT_TOKENS = 12
PROJECTION = 64
VALIDATED = 400
FIRST_SCALE = 1 / 0.07  # of the cosines, before they are compared


def untrained(
    vision: Blip2VisionModel, tokenizer: PreTrainedTokenizerFast
) -> Blip2ForImageTextRetrieval:
    """The matching model with a trained vision model and everything else new.

    Its configuration describes a language model, as the published one's does, but it has none.
    """
    config = Blip2Config(
        vision_config=architecture.vision_config(),
        qformer_config=architecture.qformer_config(tokenizer),
        text_config=architecture.opt_config(vocabulary.opt_tokenizer()),
        num_query_tokens=architecture.QUERIES,
        image_text_hidden_size=PROJECTION,
        image_token_index=tokenizer.convert_tokens_to_ids(vocabulary.IMAGE_TOKEN),
    )
    model = Blip2ForImageTextRetrieval._from_config(config, attn_implementation="eager")
    model.vision_model.load_state_dict(vision.state_dict())
    model.vision_model.requires_grad_(False)
    nn.init.normal_(model.query_tokens, std=architecture.QUERY_DEVIATION)
    return model


@dataclass(frozen=True)
class Encoded:
    """Texts as (batch, TEXT_TOKENS)."""

    ids: Tensor
    mask: Tensor


class MatchingTeacher:
    """Draws true and false texts about scenes, in a fixed form for the compiled model."""

    def __init__(self, scenes: list[world.Scene], tokenizer: PreTrainedTokenizerFast) -> None:
        self._rng = random.Random(2)
        self._tokenizer = tokenizer
        self.scenes = scenes
        self.captions = [scene.caption for scene in scenes]
        numbers = {caption: number for number, caption in enumerate(sorted(set(self.captions)))}
        self.caption_numbers = torch.tensor([numbers[caption] for caption in self.captions])
        self._presence = _presence(scenes)

    def encode(self, texts: list[str]) -> Encoded:
        """Padded to the one length that all texts have room in."""
        encoded = self._tokenizer(
            texts, padding="max_length", max_length=TEXT_TOKENS, return_tensors="pt"
        )
        return Encoded(encoded.input_ids, encoded.attention_mask)

    def mentions(self, rows: Tensor) -> tuple[list[str], Tensor]:
        """A shape of each picture in words, and whether it is there: (texts, pictures)."""
        chosen = [
            self._rng.choice(present) if present else self._rng.randrange(len(_NAMES))
            for present in (self._presence[row].nonzero()[:, 0].tolist() for row in rows)
        ]
        return [_NAMES[number] for number in chosen], self._presence[rows][:, chosen].T

    def true_parts(self, rows: list[int]) -> list[str]:
        """For each picture a true text that says less than the caption, where there is one."""
        return [self._rng.choice(self.scenes[row].matching_texts()[-4:]) for row in rows]

    def changed(self, rows: list[int]) -> list[str]:
        """For each picture a text that is false by one attribute, most often the caption."""
        return [
            self.scenes[row].one_attribute_change(
                self._rng, None if self._rng.random() < 0.7 else self.true_parts([row])[0]
            )
            for row in rows
        ]

    def others(self, rows: list[int], similar: Tensor) -> list[str]:
        """For each picture a caption of another, false of it: any, or the most similar one."""
        ranked = similar.argsort(dim=1, descending=True).tolist()
        return [
            self._hard(row, [rows[column] for column in columns])
            if self._rng.random() < 0.5
            else self.scenes[row].non_matching_texts(self._rng)[0]
            for row, columns in zip(rows, ranked, strict=True)
        ]

    def _hard(self, row: int, candidates: list[int]) -> str:
        captions = (self.captions[other] for other in candidates)
        return next(text for text in captions if not world.is_true(text, self.scenes[row]))


_NAMES = [world.Mention(color, kind).text for color in world.COLORS for kind in world.KINDS]


def _presence(scenes: list[world.Scene]) -> Tensor:
    """Whether each colour and kind is there: (scenes, names)."""
    present = torch.zeros(len(scenes), len(_NAMES), dtype=torch.bool)
    for row, scene in enumerate(scenes):
        for shape in scene.shapes:
            number = world.COLORS.index(shape.color) * len(world.KINDS)
            present[row, number + world.KINDS.index(shape.kind)] = True
    return present


def train(
    vision: Blip2VisionModel, training: Pictures, validation: Pictures, steps: int = STEPS
) -> None:
    """Contrast, matching, and what the queries are to know; the latest state is in the package."""
    torch.manual_seed(2)
    tokenizer = vocabulary.itm_tokenizer()
    model, heads = untrained(vision, tokenizer), QueryHeads()
    scale = nn.ParameterList([nn.Parameter(torch.tensor(FIRST_SCALE).log())])
    teacher, labels = MatchingTeacher(training.scenes, tokenizer), Labels(training.scenes)
    seen = features(vision, training)
    seen_in_validation = features(vision, validation)[:VALIDATED].float()
    order = batches(len(training), BATCH, torch.Generator().manual_seed(2))
    of_images = torch.compile(lambda images: image_outputs(model, images))
    of_texts = torch.compile(lambda text: text_vectors(model, text.ids, text.mask))
    of_pairs = torch.compile(lambda images, text: pair_logits(model, images, text.ids, text.mask))

    def losses(step: int) -> dict[str, Tensor]:
        rows = next(order)
        numbers, images = rows.tolist(), seen[rows]
        captions = [teacher.captions[row] for row in numbers]
        mentions, mentioned = teacher.mentions(rows)
        with mixed_precision():
            queries, image_vectors = of_images(images)
            vectors = of_texts(teacher.encode(captions + mentions))
            known = heads.loss(queries, labels, rows)
            cosines = torch.einsum("iqd,td->iqt", image_vectors, vectors).amax(dim=1).float()
            similar = cosines[:, :BATCH].detach()
            texts = captions + teacher.true_parts(numbers)
            texts += teacher.changed(numbers) + teacher.others(numbers, similar)
            logits = of_pairs(images.repeat(4, 1, 1), teacher.encode(texts)).float()
        same = teacher.caption_numbers[rows, None] == teacher.caption_numbers[None, rows]
        true = torch.arange(4).repeat_interleave(BATCH) < 2
        return {
            "match": cross_entropy(logits, true.long()),
            "contrast": contrast(cosines * scale[0].exp().clamp(max=100), same, mentioned),
            "queries": known,
        }

    def checkpoint(step: int) -> None:
        model.eval()
        scenes = validation.scenes[:VALIDATED]
        scores = matching_scores(model, tokenizer, scenes, seen_in_validation, galleries=2)
        LOG.info("%s", " ".join(f"{name} {score:.3f}" for name, score in scores.items()))
        save(model, tokenizer, ITM)
        model.train()

    optimize(parameter_groups(model, heads, scale), losses, steps, PEAK, checkpoint)


def contrast(logits: Tensor, same: Tensor, mentioned: Tensor) -> Tensor:
    """Of logits (images, captions then mentions): a caption means the pictures of that caption.

    A mention means every picture with that shape, so it does not choose among them.
    """
    captions, mentions = logits[:, : len(same)], logits[:, len(same) :]
    whole = _to_any(captions, same) + _to_any(captions.T, same)
    some = mentioned.any(dim=1)
    return 0.5 * whole + 0.3 * _to_all(mentions.T[some], mentioned[some])


def _to_any(logits: Tensor, right: Tensor) -> Tensor:
    """How improbable it is, line by line, that one of the right ones is chosen."""
    chosen = logits.log_softmax(dim=1).masked_fill(~right, float("-inf"))
    return -chosen.logsumexp(dim=1).mean()


def _to_all(logits: Tensor, right: Tensor) -> Tensor:
    """How improbable the right ones are, line by line, each as important."""
    return -((logits.log_softmax(dim=1) * right).sum(dim=1) / right.sum(dim=1)).mean()


def image_outputs(model: Blip2ForImageTextRetrieval, images: Tensor) -> tuple[Tensor, Tensor]:
    """Query outputs (batch, 32, width) and their unit vectors (batch, 32, size)."""
    queries = model.qformer(
        query_embeds=model.query_tokens.expand(len(images), -1, -1), encoder_hidden_states=images
    ).last_hidden_state
    return queries, normalize(model.vision_projection(queries), dim=-1)


def text_vectors(model: Blip2ForImageTextRetrieval, ids: Tensor, mask: Tensor) -> Tensor:
    """Unit vectors (batch, size)."""
    hidden = model.qformer(
        query_embeds=model.embeddings(input_ids=ids), query_length=0, attention_mask=mask
    ).last_hidden_state
    return normalize(model.text_projection(hidden[:, 0]), dim=-1)


def pair_logits(
    model: Blip2ForImageTextRetrieval, images: Tensor, ids: Tensor, mask: Tensor
) -> Tensor:
    """Logits (batch, 2) of each image with its text."""
    queries = model.query_tokens.expand(len(images), -1, -1)
    hidden = model.qformer(
        query_embeds=model.embeddings(input_ids=ids, query_embeds=queries),
        query_length=architecture.QUERIES,
        attention_mask=nn.functional.pad(mask, (architecture.QUERIES, 0), value=1),
        encoder_hidden_states=images,
    ).last_hidden_state
    return model.itm_head(hidden[:, : architecture.QUERIES]).mean(dim=1)
