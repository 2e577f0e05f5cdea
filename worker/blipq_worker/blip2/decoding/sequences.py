"""A sequence: an image, a prompt and the tokens written so far, or the beams that go on from it."""

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch

from blipq_worker.blip2.text import repetition
from blipq_worker.inference.requests import OnLoop


class RowParams(Protocol):
    """How a row's tokens are chosen, under Hugging Face's names; lengths count new tokens."""

    @property
    def max_new_tokens(self) -> int: ...
    @property
    def min_new_tokens(self) -> int: ...
    @property
    def do_sample(self) -> bool: ...
    @property
    def temperature(self) -> float: ...
    @property
    def top_p(self) -> float: ...
    @property
    def top_k(self) -> int: ...
    @property
    def repetition_penalty(self) -> float: ...
    @property
    def no_repeat_ngram_size(self) -> int: ...
    @property
    def num_beams(self) -> int: ...
    @property
    def length_penalty(self) -> float: ...
    @property
    def num_return_sequences(self) -> int: ...
    @property
    def on_loop(self) -> OnLoop: ...


@dataclass(frozen=True, slots=True)
class RowText:
    """A text: its tokens, up to the end token if it has one, and the log-probability of each.

    In natural logarithms, of the model's own distribution: before temperature, penalties and bans.
    looped: it went on in a loop, which is cut off. rewritten: it takes the place of a loop.
    """

    tokens: list[int]
    logs: list[float]
    looped: bool = False
    rewritten: bool = False


@dataclass(slots=True, eq=False)
class Row:
    """An image's projected queries, (32, hidden), a prompt, and the tokens written so far.

    ``seed`` is that of its draws (``row_seed``); nothing else decides them. ``adapter``: see
    ``adapters.layers.Rows``. ``joined``: it has had a slot; its first token may come later. With
    beams ``tokens`` stays empty: once it has ended, ``texts`` has the best of them, and ``scores``
    their sums of log-probabilities, divided by the length penalty. ``logs``, ``text_logs``:
    see ``RowText``, of every token of these.
    ``kept``: how many tokens are left of each text that went on in a loop, by its index.
    ``replaced``: the row with loops whose place this one takes.
    """

    queries: torch.Tensor
    ids: list[int]
    params: RowParams
    seed: int = 0
    tokens: list[int] = field(default_factory=list)
    ended: bool = False
    joined: bool = False
    texts: list[list[int]] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    adapter: int = 0
    logs: list[float] = field(default_factory=list)
    text_logs: list[list[float]] = field(default_factory=list)
    kept: dict[int, int] = field(default_factory=dict)
    replaced: "Row | None" = None

    def write(self, token: int, log: float, ends: Collection[int]) -> None:
        """Appends a token; an end token, the last one allowed, or a loop ends the row."""
        self.tokens.append(token)
        self.logs.append(log)
        length = len(self.tokens)
        self.ended = token in ends or length >= self.params.max_new_tokens
        if self.ended or repetition.is_due(length):
            self._cut(0, self.tokens, ends)
            self.ended = self.ended or bool(self.kept)

    def settle(
        self,
        texts: list[list[int]],
        scores: list[float],
        logs: list[list[float]],
        ends: Collection[int],
    ) -> None:
        """Ends the search of its beams with these texts, best first."""
        self.texts, self.scores, self.text_logs, self.ended = texts, scores, logs, True
        for index, text in enumerate(texts):
            self._cut(index, text, ends)

    def _cut(self, index: int, text: Sequence[int], ends: Collection[int]) -> None:
        """Notes what is left of a text in a loop, unless its shortest length requires more.

        A text that the model has ended is no loop, whatever it repeats: a number has equal digits.
        """
        if self.params.on_loop == "keep" or (text and text[-1] in ends):
            return
        left = repetition.kept(text, self.params.min_new_tokens)
        if left is not None:
            self.kept[index] = left

    @property
    def alternatives(self) -> list[list[int]]:
        """What it came to, best first."""
        return self.texts if self.has_beams else [self.tokens]

    @property
    def outputs(self) -> list[RowText]:
        """The same with the logarithms of their probabilities, and without loops.

        Of a row that replaces another one: the other's, but for its loops, each of which is the
        best text here that is not there yet.
        """
        logs = self.text_logs if self.has_beams else [self.logs]
        own = [
            RowText(text[: self.kept.get(index)], each[: self.kept.get(index)], index in self.kept)
            for index, (text, each) in enumerate(zip(self.alternatives, logs, strict=True))
        ]
        if self.replaced is None:
            return own
        before = self.replaced.outputs
        left = [text.tokens for text in before if not text.looped]
        new = (replace(text, rewritten=True) for text in own if text.tokens not in left)
        return [next(new, text) if text.looped else text for text in before]

    @property
    def has_beams(self) -> bool:
        return self.params.num_beams > 1

    @property
    def prompt_length(self) -> int:
        """Positions before the first new token."""
        return len(self.queries) + len(self.ids)


def row_seed(seed: int, alternative: int = 0) -> int:
    """The seed of the n-th alternative text of one seed; 64 bits with a sign."""
    digest = hashlib.blake2b(f"{seed}/{alternative}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, signed=True)
