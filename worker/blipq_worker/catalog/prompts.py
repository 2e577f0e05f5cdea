"""What the model reads: LAVIS's prompts and its text preprocessing.

Sources: lavis/processors/blip_processors.py (``blip_caption``), lavis/projects/blip2/eval and
projects/blip2/README.md (questions and chat).
"""

import re
from collections.abc import Sequence

VQA_PROMPT = "Question: {} Short answer:"

_PROMPT = re.compile(r"question:.*answer:", re.I | re.DOTALL)
_MATCH_WORDS = 50
_PUNCTUATION = re.compile(r"[.!\"()*#:;~]")
_GAPS = re.compile(r"\s{2,}")


def caption_prompt(prompt: str | None, default: str) -> str:
    """The job's prompt, or the checkpoint's default when none was."""
    return default if prompt is None else prompt.strip()


def vqa_prompt(question: str, history: Sequence[tuple[str, str]] = ()) -> str:
    """The question as the evaluations ask it; after earlier turns, as the authors' chat does.

    ``history`` holds (question, answer) pairs, oldest first.
    """
    question = _on_one_line(question)
    if not history:
        return VQA_PROMPT.replace("{}", question)
    turns = [
        f"Question: {_on_one_line(earlier)} Answer: {_on_one_line(answer)}."
        for earlier, answer in history
    ]
    return " ".join([*turns, f"Question: {question} Answer:"])


def has_a_prompt(question: str) -> bool:
    """Whether a question brings a prompt of its own, which is then put into another one."""
    return _PROMPT.search(question) is not None


def _on_one_line(text: str) -> str:
    """Single spaces in between and none around: line ends and gaps change answers."""
    return " ".join(text.split())


def match_text(text: str) -> str:
    """The text as retrieval models saw texts in training.

    Lower case, some punctuation to spaces, single spaces, and the first 50 words.
    """
    text = _PUNCTUATION.sub(" ", text.lower())
    words = _GAPS.sub(" ", text).rstrip("\n").strip(" ").split(" ")
    return " ".join(words[:_MATCH_WORDS])
