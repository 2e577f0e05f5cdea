"""What the language models are taught to say, and how it is asked for."""

import random
from collections.abc import Iterator
from dataclasses import dataclass

from tools.demo_model.vocabulary import CAPTION_PROMPTS, QUESTION_PROMPTS

from blipq_worker.demo import world

SHORT, PLAIN, BARE = QUESTION_PROMPTS
_PROMPT_WEIGHTS = {SHORT: 55, PLAIN: 17, BARE: 8}
_CHAT_WEIGHT = 20
_TURN_WEIGHTS = {1: 60, 2: 28, 3: 12}
_KIND_WEIGHTS = {
    "color": 1.0,
    "shape": 1.0,
    "count": 1.2,
    "exist": 1.6,
    "where": 1.6,
    "background": 0.4,
}
ANSWER_WEIGHT = 4.0  # of an answer's tokens, which are few, against a caption's


@dataclass(frozen=True)
class Example:
    """A prompt, the text that shall follow, and how much each of its tokens counts."""

    prompt: str
    text: str
    weight: float


class Teacher:
    """Draws endless examples about scenes."""

    def __init__(self, scenes: list[world.Scene], seed: int) -> None:
        self._rng = random.Random(seed)
        self._captions = [scene.caption for scene in scenes]
        self._questions = [_by_kind(scene) for scene in scenes]

    def examples(self, row: int) -> Iterator[Example]:
        """The caption after both prompts, then questions without end."""
        for prompt in CAPTION_PROMPTS:
            yield Example(prompt, self._captions[row], 1.0)
        while True:
            yield self._answer(row)

    def _answer(self, row: int) -> Example:
        asked = self._question(row)
        (prompt,) = self._rng.choices(
            [*_PROMPT_WEIGHTS, None], [*_PROMPT_WEIGHTS.values(), _CHAT_WEIGHT]
        )
        text = prompt.format(asked.question) if prompt else self._chat(row, asked)
        return Example(text, asked.answer, ANSWER_WEIGHT)

    def _chat(self, row: int, asked: world.QuestionAnswer) -> str:
        """The question after some earlier turns about the same picture."""
        (turns,) = self._rng.choices([*_TURN_WEIGHTS], [*_TURN_WEIGHTS.values()])
        return chat_prompt([self._question(row) for _ in range(turns)], asked.question)

    def _question(self, row: int) -> world.QuestionAnswer:
        by_kind = self._questions[row]
        (kind,) = self._rng.choices([*by_kind], [_KIND_WEIGHTS[kind] for kind in by_kind])
        return self._rng.choice(by_kind[kind])


def chat_prompt(turns: list[world.QuestionAnswer], question: str) -> str:
    """Earlier turns with their answers and a new question."""
    earlier = [f"{PLAIN.format(turn.question)} {turn.answer}." for turn in turns]
    return " ".join([*earlier, PLAIN.format(question)])


def _by_kind(scene: world.Scene) -> dict[str, list[world.QuestionAnswer]]:
    asked: dict[str, list[world.QuestionAnswer]] = {}
    for question in scene.questions():
        asked.setdefault(question.kind, []).append(question)
    return asked
