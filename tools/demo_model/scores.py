"""How often the models are right."""

import random
from collections.abc import Sequence

import torch
from tools.demo_model.inference import (
    GREEDY,
    Decoding,
    generate,
    image_embeddings,
    match_logits,
    similarities,
    text_embeddings,
)
from tools.demo_model.texts import SHORT
from tools.demo_model.vocabulary import CAPTION_PROMPTS
from torch import Tensor
from transformers import (
    Blip2ForConditionalGeneration,
    Blip2ForImageTextRetrieval,
    PreTrainedTokenizerBase,
)

from blipq_worker.demo import world

BATCH = 50
GALLERY = 100


def generation_scores(
    model: Blip2ForConditionalGeneration,
    tokenizer: PreTrainedTokenizerBase,
    scenes: Sequence[world.Scene],
    images: Tensor,
    caption: Decoding = GREEDY,
    answer: Decoding = GREEDY,
    prompt: str = SHORT,
) -> dict[str, float]:
    """The share of exactly right texts: captions by prompt, answers by kind of question.

    Every scene is asked one question of every kind that it can answer; images are vision features
    (scenes, 65, width).
    """

    def right(rows: list[int], prompts: list[str], texts: list[str], decoding: Decoding) -> float:
        said: list[str] = []
        for start in range(0, len(rows), BATCH):
            chunk = slice(start, start + BATCH)
            said += generate(model, tokenizer, images[rows[chunk]], prompts[chunk], decoding)
        return sum(map(str.__eq__, said, texts)) / len(texts)

    everyone = list(range(len(scenes)))
    captions = [scene.caption for scene in scenes]
    scores = {
        f"caption {text!r}": right(everyone, [text] * len(scenes), captions, caption)
        for text in CAPTION_PROMPTS
    }
    for kind in world.QUESTION_KINDS:
        rows, asked = one_each(scenes, kind)
        prompts = [prompt.format(question.question.lower()) for question in asked]
        scores[kind] = right(rows, prompts, [question.answer for question in asked], answer)
    return scores


def one_each(
    scenes: Sequence[world.Scene], kind: str
) -> tuple[list[int], list[world.QuestionAnswer]]:
    """One question of this kind about every scene that allows one."""
    rng = random.Random(kind)
    rows, chosen = [], []
    for row, scene in enumerate(scenes):
        if asked := [question for question in scene.questions() if question.kind == kind]:
            rows.append(row)
            chosen.append(rng.choice(asked))
    return rows, chosen


def matching_scores(
    model: Blip2ForImageTextRetrieval,
    tokenizer: PreTrainedTokenizerBase,
    scenes: Sequence[world.Scene],
    images: Tensor,
    galleries: int,
) -> dict[str, float]:
    """Balanced accuracy on each kind of text, and recall@1 of pictures by their captions.

    Images are vision features (scenes, 65, width).
    """
    rng = random.Random("matching")

    def accepted(texts: list[str]) -> float:
        chunks = zip(images.split(BATCH), _chunks(texts), strict=True)
        logits = torch.cat([match_logits(model, tokenizer, *chunk) for chunk in chunks])
        return float((logits.float().softmax(dim=1)[:, 1] > 0.5).float().mean())

    def balanced(true: list[str], false: list[str]) -> float:
        return (accepted(true) + 1 - accepted(false)) / 2

    captions = [scene.caption for scene in scenes]
    others = [scene.non_matching_texts(rng)[0] for scene in scenes]
    parts = [rng.choice(scene.matching_texts()) for scene in scenes]
    return {
        "caption or another scene's": balanced(captions, others),
        "caption or one attribute changed": balanced(
            captions, [scene.one_attribute_change(rng) for scene in scenes]
        ),
        "part of the truth or another scene's": balanced(parts, others),
        "part of the truth or one attribute changed": balanced(
            parts,
            [scene.one_attribute_change(rng, t) for scene, t in zip(scenes, parts, strict=True)],
        ),
        **_recalls(model, tokenizer, scenes, images, galleries),
    }


def _chunks(texts: list[str]) -> list[list[str]]:
    return [texts[start : start + BATCH] for start in range(0, len(texts), BATCH)]


def _recalls(
    model: Blip2ForImageTextRetrieval,
    tokenizer: PreTrainedTokenizerBase,
    scenes: Sequence[world.Scene],
    images: Tensor,
    count: int,
) -> dict[str, float]:
    """Mean recall@1 over galleries: by cosine, and by cosine plus matching logit."""
    first, reranked = [], []
    for rows in galleries(scenes, count):
        texts = [scenes[row].caption for row in rows]
        cosines = similarities(
            image_embeddings(model, images[rows]), text_embeddings(model, tokenizer, texts)
        ).float()
        matches = [
            match_logits(model, tokenizer, images[rows], [text] * len(rows))[:, 1] for text in texts
        ]
        diagonal = torch.arange(len(rows))
        first.append((cosines.argmax(dim=0) == diagonal).float().mean())
        both = cosines + torch.stack(matches, dim=1).float()
        reranked.append((both.argmax(dim=0) == diagonal).float().mean())
    return {
        "recall@1 by cosine": float(torch.stack(first).mean()),
        "recall@1 with matching": float(torch.stack(reranked).mean()),
    }


def galleries(scenes: Sequence[world.Scene], count: int) -> list[list[int]]:
    """Rows of scenes, no two of a gallery with the same caption."""
    galleries: list[list[int]] = [[] for _ in range(count)]
    captions: list[set[str]] = [set() for _ in range(count)]
    for row, scene in enumerate(scenes):
        for gallery, known in zip(galleries, captions, strict=True):
            if len(gallery) < GALLERY and scene.caption not in known:
                gallery.append(row)
                known.add(scene.caption)
                break
    return galleries
