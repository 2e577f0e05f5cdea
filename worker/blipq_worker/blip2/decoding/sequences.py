"""A sequence: an image, a prompt and the tokens written so far, or the beams that go on from it."""

import hashlib
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Protocol

import torch


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


@dataclass(slots=True, eq=False)
class Row:
    """An image's projected queries, (32, hidden), a prompt, and the tokens written so far.

    ``seed`` is that of its draws (``row_seed``); nothing else decides them. ``adapter``: see
    ``adapters.layers.Rows``. ``joined``: it has had
    a slot; its first token may come later. With beams ``tokens`` stays empty: once it has ended,
    ``texts`` has the best of them, and ``scores`` their sums of log-probabilities, divided as the
    length penalty says.
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

    def write(self, token: int, ends: Collection[int]) -> None:
        """Appends a token; an end token, or the last one allowed, ends the row."""
        self.tokens.append(token)
        self.ended = token in ends or len(self.tokens) >= self.params.max_new_tokens

    def settle(self, texts: list[list[int]], scores: list[float]) -> None:
        """Ends the search of its beams with these texts, best first."""
        self.texts, self.scores, self.ended = texts, scores, True

    @property
    def alternatives(self) -> list[list[int]]:
        """What it came to, best first."""
        return self.texts if self.has_beams else [self.tokens]

    @property
    def has_beams(self) -> bool:
        return self.params.num_beams > 1

    @property
    def prompt_length(self) -> int:
        """Positions before the first new token."""
        return len(self.queries) + len(self.ids)


def row_seed(seed: int, alternative: int = 0) -> int:
    """The seed of the n-th alternative text that one seed asks for; 64 bits with a sign."""
    digest = hashlib.blake2b(f"{seed}/{alternative}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, signed=True)
