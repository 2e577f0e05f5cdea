"""Answers to questions: written, or chosen from those that are offered."""

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from functools import partial

from blipq.contract import Answer, Choice, Kind, VQARequest, VQAResult
from blipq_worker.catalog.prompts import has_a_prompt, vqa_prompt
from blipq_worker.inference.requests import (
    Feature,
    Generate,
    Generated,
    ImagePixels,
    Rank,
    Ranked,
)
from blipq_worker.kinds.generation import confidence, is_uncertain, params_of, remark
from blipq_worker.kinds.spec import Ask, Part, SinglePart

Turns = tuple[tuple[str, str], ...]

PROMPT_NOTE = (
    "a question holds 'Question: ... Answer:', which blipq writes around each: leave these words "
    "out, or give the whole as the prompt of a caption"
)


class VqaSpec(SinglePart[VQARequest]):
    """One ``Generate`` for all questions; with ``choices`` one ``Rank``."""

    kind = Kind.VQA

    def needs(self, request: VQARequest) -> frozenset[Feature]:
        """The queries of the generation checkpoint."""
        return frozenset({"generation"})

    def part(self, request: VQARequest, image: ImagePixels | None, ask: Ask) -> Part[VQAResult]:
        """One prompt per question, each with as many earlier turns as there is room for."""
        assert image is not None
        params = params_of("vqa", ask.info, request.generation)
        choices = request.choices

        def item(*prompts: str) -> Generate | Rank:
            if choices is not None:
                return Rank(image, prompts, choices)
            return Generate(image, prompts, params)

        def fits(question: str, turns: Turns) -> bool:
            return ask.fits(item(vqa_prompt(question, turns)))

        turns = tuple((turn.question, turn.answer) for turn in request.history)
        kept = [_newest(turns, partial(fits, question)) for question in request.questions]
        dropped = len(turns) - min(map(len, kept))
        if dropped:
            ask.note(f"{dropped} of {len(turns)} earlier turns were left out: there was no room")
        if any(map(has_a_prompt, request.questions)):
            ask.note(PROMPT_NOTE)
        made = partial(_answers, request, ask) if choices is None else partial(_choices, request)
        return Part("generate", item(*map(vqa_prompt, request.questions, kept)), made)


def _newest(turns: Turns, fits: Callable[[Turns], bool]) -> Turns:
    """The turns without the oldest ones, so that the rest fits; none if even the last does not.

    The fewer turns, the shorter the prompt: what to leave out is found by halving.
    """
    first = bisect_left(range(len(turns)), True, key=lambda first: fits(turns[first:]))
    return turns[first:]


def _answers(request: VQARequest, ask: Ask, generated: Generated) -> VQAResult:
    remark((texts[0] for texts in generated.texts), ask.note)
    least = request.min_confidence
    return VQAResult(
        answers=tuple(
            Answer(question=question, text=texts[0].text, **confidence(texts[0], least))
            for question, texts in zip(request.questions, generated.texts, strict=True)
        )
    )


def _choices(request: VQARequest, ranked: Ranked) -> VQAResult:
    choices = request.choices or ()
    return VQAResult(
        answers=tuple(
            _ranked(question, choices, likelihoods, request.min_confidence)
            for question, likelihoods in zip(request.questions, ranked.likelihoods, strict=True)
        )
    )


def _ranked(
    question: str, texts: Sequence[str], likelihoods: Sequence[float], least: float | None
) -> Answer:
    """The choices, most likely first, with probabilities that add up to 1."""
    greatest = max(likelihoods)
    weights = [math.exp(likelihood - greatest) for likelihood in likelihoods]
    choices = [
        Choice(text=text, probability=weight / sum(weights), log_likelihood=likelihood)
        for text, weight, likelihood in zip(texts, weights, likelihoods, strict=True)
    ]
    choices.sort(key=lambda choice: -choice.probability)
    first = choices[0]
    uncertain = is_uncertain(first.probability, least)
    return Answer(question=question, text=first.text, choices=tuple(choices), uncertain=uncertain)


SPEC = VqaSpec()
