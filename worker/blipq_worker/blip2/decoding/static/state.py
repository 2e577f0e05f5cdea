"""What the device knows of the sequences in its slots: all that a step reads and writes.

Everything has a fixed place, so that a step takes nothing from the host and can be captured as a
CUDA graph. A slot without a running sequence is idle: it computes, and nothing comes of it.
"""

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch

from blipq_worker.blip2.decoding.sequences import Row

#: The longest n-gram that a step can forbid.
LONGEST_NGRAM = 32

# Columns of ``SlotState.params``. Of numbers with a fraction it holds the bits, as float64.
_LIMIT, _LEAST, _SEED, _DRAWS, _TOP_K, _NGRAM, _BEAMS = range(7)
_TEMPERATURE, _TOP_P, _REPETITION, _LENGTH = range(7, 11)
ADAPTER = 11
PARAMS = 12


class Place(NamedTuple):
    """Where a sequence is. group: that of its beams, from 1, with a slot for each; 0: no beams."""

    slots: tuple[int, ...]
    group: int = 0


def packed_params(row: Row) -> list[int]:
    """A sequence's parameters as a row of ``SlotState.params``."""
    params = row.params
    whole = [params.max_new_tokens, params.min_new_tokens, row.seed, int(params.do_sample)]
    whole += [params.top_k, params.no_repeat_ngram_size, params.num_beams]
    fractions = params.temperature, params.top_p, params.repetition_penalty, params.length_penalty
    bits = [int.from_bytes(struct.pack("<d", value), "little", signed=True) for value in fractions]
    return [*whole, *bits, row.adapter]


@dataclass(slots=True)
class SlotState:
    """Tensors with one entry per slot; ``first`` gives views of them, ``fresh`` new ones.

    A beam has a slot as a sequence without beams has; what else there is of it is in ``groups``.

    tokens: (n,), the last token written, which the next step reads. positions: (n,), where in the
    language model's self-attention it goes. written: (n,), new tokens so far. live: (n,), whether
    the next token counts. params: (n, PARAMS). history: (n, columns), what penalties count as
    written, in order. seen: (n, vocabulary), the same as a set. The last two are kept only where
    the parameters of a sequence without beams penalize.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    written: torch.Tensor
    live: torch.Tensor
    params: torch.Tensor
    history: torch.Tensor
    seen: torch.Tensor

    @classmethod
    def empty(cls, slots: int, columns: int, vocabulary: int, device: torch.device) -> "SlotState":
        """The state of slots that are all idle: zeros."""

        def zeros(dtype: torch.dtype, *shape: int) -> torch.Tensor:
            return torch.zeros((slots, *shape), dtype=dtype, device=device)

        return cls(
            tokens=zeros(torch.long),
            positions=zeros(torch.long),
            written=zeros(torch.long),
            live=zeros(torch.bool),
            params=zeros(torch.long, PARAMS),
            history=zeros(torch.long, columns),
            seen=zeros(torch.bool, vocabulary),
        )

    def fresh(
        self, params: torch.Tensor, positions: torch.Tensor, start: Sequence[int]
    ) -> "SlotState":
        """Sequences about to write their first token, at ``positions`` + 1.

        start: what penalties count as written before it.
        """
        made = SlotState.empty(
            len(params), self.history.shape[1], self.seen.shape[1], params.device
        )
        made.params, made.positions = params, positions
        made.live.fill_(True)
        for index, token in enumerate(start):
            made.history[:, index] = token
            made.seen[:, token] = True
        return made

    def first(self, count: int) -> "SlotState":
        """The first ``count`` slots: views."""
        return SlotState(*(tensor[:count] for tensor in self._tensors()))

    def copy(self) -> "SlotState":
        """The same in memory of its own."""
        return SlotState(*(tensor.clone() for tensor in self._tensors()))

    def restore(self, copied: "SlotState") -> None:
        """Takes over what was copied."""
        for mine, theirs in zip(self._tensors(), copied._tensors(), strict=True):
            mine.copy_(theirs)

    def clear(self) -> None:
        """Makes all slots idle ones that nobody was in."""
        for tensor in self._tensors():
            tensor.zero_()

    def release(self, at: torch.Tensor) -> None:
        """Makes the slots ``at`` idle; they then look at one column."""
        self.live.index_fill_(0, at, False)
        self.positions.index_fill_(0, at, 0)

    def place(self, at: torch.Tensor, other: "SlotState") -> None:
        """Puts other sequences into the slots ``at``, (len(other),)."""
        for mine, theirs in zip(self._tensors(), other._tensors(), strict=True):
            mine.index_copy_(0, at, theirs)

    def place_beams(self, at: torch.Tensor, other: "SlotState", tokens: torch.Tensor) -> None:
        """Puts the beams of other sequences, that have written ``tokens``, into the slots ``at``.

        Both (len(other), beams); a slot may come twice with the same token.
        """

        def each(tensor: torch.Tensor) -> torch.Tensor:
            return tensor[:, None].expand(-1, at.shape[1], *tensor.shape[1:]).flatten(0, 1)

        slots = at.flatten()
        pairs = [
            (self.tokens, tokens.flatten()),
            (self.positions, each(other.positions)),
            (self.written, each(other.written)),
            (self.live, each(other.live)),
            (self.params, each(other.params)),
        ]
        for mine, theirs in pairs:
            mine.index_copy_(0, slots, theirs)

    def _tensors(self) -> Iterator[torch.Tensor]:
        return (getattr(self, field.name) for field in fields(self))

    @property
    def bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self._tensors())

    def advance(self, token: torch.Tensor, going: torch.Tensor, *, remember: int | None) -> None:
        """Writes the next token of every live sequence, (n,).

        going: (n,), whether it goes on then. A slot that is not live stays as it is. remember:
        where in ``history`` new tokens begin; None where nobody's parameters penalize.
        """
        written = self.written + self.live
        live = self.live & going
        positions = self.positions + live
        kept = torch.where(self.live, token, self.tokens)
        remembered = None if remember is None else self._remembered(token, remember)
        # From here on nothing takes memory: a step that found none can be taken again.
        if remembered is not None:
            at, history, seen = remembered
            self.history.scatter_(1, at, history)
            self.seen.scatter_(1, token[:, None], seen)
        self.tokens.copy_(kept)
        self.written.copy_(written)
        self.live.copy_(live)
        self.positions.copy_(positions)

    def _remembered(
        self, token: torch.Tensor, offset: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Where in ``history`` the tokens go, and what comes there and to ``seen``, (n, 1) each."""
        at = (self.written + offset).clamp(max=self.history.shape[1] - 1)[:, None]
        live = self.live[:, None]
        history = torch.where(live, token[:, None], self.history.gather(1, at))
        return at, history, self.seen.gather(1, token[:, None]) | live

    @property
    def limit(self) -> torch.Tensor:
        """Most new tokens, (n,)."""
        return self.params[:, _LIMIT]

    @property
    def least(self) -> torch.Tensor:
        """Fewest new tokens, (n,)."""
        return self.params[:, _LEAST]

    @property
    def seed(self) -> torch.Tensor:
        """Seeds of the draws, (n,)."""
        return self.params[:, _SEED]

    @property
    def draws(self) -> torch.Tensor:
        """Whether tokens are drawn, (n,)."""
        return self.params[:, _DRAWS] > 0

    @property
    def top_k(self) -> torch.Tensor:
        """Likeliest tokens among which is drawn, (n,); 0: all."""
        return self.params[:, _TOP_K]

    @property
    def ngram(self) -> torch.Tensor:
        """Length of the n-grams that may not come twice, (n,); 0: none."""
        return self.params[:, _NGRAM]

    @property
    def beams(self) -> torch.Tensor:
        """Beams of the search that the slot takes part in, (n,); 1: of none."""
        return self.params[:, _BEAMS]

    @property
    def adapter(self) -> torch.Tensor:
        """LoRA adapters, (n,), as ``adapters.layers.Rows`` has them."""
        return self.params[:, ADAPTER]

    @property
    def temperature(self) -> torch.Tensor:
        """(n,), fp32."""
        return self._fraction(_TEMPERATURE)

    @property
    def top_p(self) -> torch.Tensor:
        """(n,), fp32."""
        return self._fraction(_TOP_P)

    @property
    def repetition(self) -> torch.Tensor:
        """The repetition penalty, (n,), fp32."""
        return self._fraction(_REPETITION)

    @property
    def length(self) -> torch.Tensor:
        """The length penalty of searches, (n,), float64."""
        return self._double(_LENGTH)

    def _fraction(self, column: int) -> torch.Tensor:
        return self._double(column).float()

    def _double(self, column: int) -> torch.Tensor:
        return self.params[:, column].view(torch.float64)
