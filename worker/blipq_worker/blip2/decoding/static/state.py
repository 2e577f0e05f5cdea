"""What the device knows of the sequences in its slots: all that a step reads and writes.

Everything has a fixed place, so that a step takes nothing from the host and can be captured as a
CUDA graph. A slot without a running sequence is idle: it computes, and nothing comes of it.
"""

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import torch

from blipq_worker.blip2.decoding.sequences import Row

#: The longest n-gram that a step can forbid.
LONGEST_NGRAM = 32

# Columns of ``SlotState.params``. Of numbers with a fraction it holds the bits, as float64.
_LIMIT, _LEAST, _SEED, _DRAWS, _TOP_K, _NGRAM, _TEMPERATURE, _TOP_P, _REPETITION = range(9)
PARAMS = 9


def packed_params(row: Row) -> list[int]:
    """A sequence's parameters as a row of ``SlotState.params``."""
    params = row.params
    whole = [params.max_new_tokens, params.min_new_tokens, row.seed, int(params.do_sample)]
    whole += [params.top_k, params.no_repeat_ngram_size]
    return whole + [
        int.from_bytes(struct.pack("<d", value), "little", signed=True)
        for value in (params.temperature, params.top_p, params.repetition_penalty)
    ]


@dataclass(slots=True)
class SlotState:
    """Tensors with one entry per slot; ``first`` gives views of them, ``fresh`` new ones.

    tokens: (n,), the last token written, which the next step reads. positions: (n,), where in the
    language model's self-attention it goes. written: (n,), new tokens so far. live: (n,), whether
    the next token counts. params: (n, PARAMS). history: (n, columns), what penalties count as
    written, in order. seen: (n, vocabulary), the same as a set. The last two are kept only where
    the parameters penalize.
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

    def _tensors(self) -> Iterator[torch.Tensor]:
        return (getattr(self, field.name) for field in fields(self))

    @property
    def bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self._tensors())

    def advance(self, tokens: torch.Tensor, ends: torch.Tensor, *, remember: int | None) -> None:
        """Writes the next token of every live sequence, (n,); -1 is one that failed.

        An end token, the last one allowed and a failure end a sequence; a slot that is not live
        stays as it is. remember: where in ``history`` new tokens begin; None where nobody's
        parameters penalize.
        """
        token = tokens.clamp(min=0)
        written = self.written + self.live
        ended = (token[:, None] == ends).any(-1) | (written >= self.limit)
        live = self.live & (tokens >= 0) & ~ended
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

    def _fraction(self, column: int) -> torch.Tensor:
        return self.params[:, column].view(torch.float64).float()
