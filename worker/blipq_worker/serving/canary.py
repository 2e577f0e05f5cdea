"""Checks that a model describes pictures before its worker takes jobs.

Quantization, a wrong library version or a damaged checkpoint can leave a model that loads and
answers nonsense; such a worker must refuse work. The model gets two plain pictures. Where a golden
is known, its answers must agree with it; in any case they must be finite numbers and words that do
not repeat, and depend on the picture.
"""

import logging
import math
import re
from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw

from blipq.errors import BlipqError
from blipq_worker.blip2 import Blip2, GeneratedText, GenerateItem, MatchItem, RankItem
from blipq_worker.catalog.params import resolve
from blipq_worker.catalog.prompts import vqa_prompt
from blipq_worker.inference.requests import ModelInfo
from blipq_worker.serving.goldens import Golden, Observation, difference, tolerance

log = logging.getLogger(__name__)

QUESTIONS = ("what color is the circle?", "what color is the square?")
TEXTS = ("a red circle", "a blue square")
TOKENS = 12

#: Log-likelihoods that differ by less are the same: rounding may differ between rows of a batch.
_SAME = 0.05
#: A model that was trained gives the word that it chooses more than this: half, as a rule.
_LEAST_CHANCE = 0.02
#: Four times the same word, or nothing but four times the same few characters.
_REPEATS = re.compile(r"(?:.*\s)?(\S+)(?:\s+\1){3,}(?:\s.*)?|(.{1,20}?)(?:\s*\2){3,}", re.DOTALL)


class CanaryError(BlipqError):
    """The model answers nonsense; the message has its fault."""


def check(model: Blip2, golden: Golden | None = None) -> Observation:
    """What the model makes of two pictures. Raises CanaryError unless that makes sense."""
    observation = observe(model)
    log.info("canary: %s", "; ".join(observation.captions + observation.answers))
    _require_sense(observation)
    if golden is not None:
        _require_the_same(model.info, golden, observation)
    return observation


def observe(model: Blip2) -> Observation:
    """What the model makes of the pictures. Raises CanaryError where it cannot distinguish them."""
    pixels = [model.preprocess(picture) for picture in _pictures()]
    prompt = model.info.default_prompt
    ranks = [RankItem(each, (prompt,), TEXTS, model.adapter) for each in pixels]
    queries = torch.stack([looks[0] for looks in model.generator.seen(ranks)])
    if not bool(torch.isfinite(queries).all()):
        raise CanaryError("its features of a picture are not finite numbers")
    if torch.equal(queries[0], queries[1]):
        raise CanaryError("two different pictures look the same to it")
    ranked = model.rank(ranks)
    likelihoods = tuple(_rounded(item[0]) for item in ranked)
    params = resolve("caption", model.info, {"num_beams": 1, "max_new_tokens": TOKENS})
    prompts = [(prompt, vqa_prompt(question)) for question in QUESTIONS]
    written = model.generate(
        [GenerateItem(*both, params) for both in zip(pixels, prompts, strict=True)]
    )
    _require_choice([texts[0] for texts, _ in written])
    matches = None
    if model.info.has_retrieval:
        items = [MatchItem(each, TEXTS, "itm") for each in pixels]
        matches = tuple(_rounded(scores) for scores in model.match(items))
    return Observation(
        captions=tuple(texts[0].text for texts, _ in written),
        answers=tuple(texts[0].text for _, texts in written),
        likelihoods=likelihoods,
        matches=matches,
    )


def warm(model: Blip2) -> None:
    """Has everything compiled that ordinary jobs need, beside what the check itself runs."""
    pixels = [model.preprocess(picture) for picture in _pictures()]
    for kind, prompt in (("caption", model.info.default_prompt), ("vqa", vqa_prompt(QUESTIONS[0]))):
        params = resolve(kind, model.info)  # type: ignore[arg-type]
        items = [GenerateItem(each, (prompt,), params) for each in pixels]
        for some in (items[:1], items):
            model.generate(some)
    if model.info.has_retrieval:
        model.match([MatchItem(pixels[0], TEXTS[:1], head) for head in ("itm", "itc")])


def golden_of(model: Blip2) -> Golden:
    """What the model answers now, for later comparisons. Raises CanaryError for nonsense."""
    observation, info = check(model), model.info
    revisions = tuple(each for each in (info.revision, info.retrieval_revision) if each)
    return Golden(
        dtype=info.dtype, quantization=info.quantization, revisions=revisions, said=observation
    )


def _require_choice(captions: Sequence[GeneratedText]) -> None:
    """Raises CanaryError where no word of any caption is much likelier than all others."""
    chances = [text.mean_token_probability or 0.0 for text in captions]
    if max(chances) < _LEAST_CHANCE:
        texts = ", ".join(repr(text.text) for text in captions)
        raise CanaryError(f"it guesses: its own words have a chance of {max(chances):.2%}: {texts}")


def _require_sense(observation: Observation) -> None:
    numbers = [value for row in observation.likelihoods for value in row]
    if not all(map(math.isfinite, numbers)):
        raise CanaryError(f"its log-likelihoods are {observation.likelihoods}")
    if all(abs(a - b) < _SAME for a, b in zip(*observation.likelihoods, strict=True)):
        raise CanaryError("its likelihoods of texts are the same for two different pictures")
    for text in observation.captions:
        if not text.strip():
            raise CanaryError("it writes nothing about a picture")
        if _REPEATS.fullmatch(text.strip()):
            raise CanaryError(f"it repeats itself: {text!r}")
        if not any(map(str.isalnum, text)):
            raise CanaryError(f"it writes no word: {text!r}")
    for row in observation.matches or ():
        if not all(0.0 <= probability <= 1.0 for probability in row):
            raise CanaryError(f"its matching probabilities are {observation.matches}")


def _require_the_same(info: ModelInfo, golden: Golden, observation: Observation) -> None:
    allowed = tolerance((golden.dtype, golden.quantization), (info.dtype, info.quantization))
    found = difference(golden.said, observation, allowed)
    if found is None:
        return
    now = {each for each in (info.revision, info.retrieval_revision) if each}
    if now <= set(golden.revisions):
        raise CanaryError(found)
    raise CanaryError(
        f"{found}. Its weights differ from those recorded: if they were changed on purpose, run "
        f"`blipq models record-golden {info.checkpoint} --accept`"
    )


def _rounded(numbers: list[float]) -> tuple[float, ...]:
    return tuple(round(number, 4) for number in numbers)


def _pictures() -> list[Image.Image]:
    """A red circle and a blue square."""
    pictures = []
    for shape, color in (("ellipse", (220, 30, 30)), ("rectangle", (40, 60, 210))):
        picture = Image.new("RGB", (128, 128), (255, 255, 255))
        getattr(ImageDraw.Draw(picture), shape)((44, 44, 84, 84), fill=color)
        pictures.append(picture)
    return pictures
