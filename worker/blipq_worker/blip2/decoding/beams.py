"""Beam search as transformers' ``generate`` does it, for many prompts at once.

What a step finds is weighed here: which beams go on, and which texts are among the best so far. It
is the arithmetic of ``_beam_search`` (transformers/generation/utils.py) in the same order and type,
on tensors whose shapes depend on no number in them: nothing is read back, so that one code serves
CPUs and steps in static slots. Prompts have beams of their own number k; K is the largest.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal

import torch

from blipq_worker.blip2.decoding.sequences import Row

#: The score of what is no candidate.
NONE = -1.0e9

#: When a prompt's search ends; ``early_stopping`` of transformers.
Stopping = Literal["never"] | bool


@dataclass(slots=True)
class Beams:
    """The beams of n prompts, and the k best texts of each that have ended.

    beams, limit, least, count: (n,), how many there are, the most and the fewest new tokens of a
    text, and how many of them are written. penalty: (n,), float64, of the length. scores, texts:
    (n, K) and (n, K, T), the sums of log-probabilities of what is being written, best first, and
    its tokens, T5's start token included. best, found, lengths, ended: (n, K), the same of the best
    texts with the penalty, (n, K, T), their tokens; (n, K), new tokens; (n, K), False for what
    merely holds a place.
    """

    beams: torch.Tensor
    limit: torch.Tensor
    least: torch.Tensor
    count: torch.Tensor
    penalty: torch.Tensor
    scores: torch.Tensor
    texts: torch.Tensor
    best: torch.Tensor
    found: torch.Tensor
    lengths: torch.Tensor
    ended: torch.Tensor

    @classmethod
    def fresh(cls, rows: Sequence[Row], start: Sequence[int], device: torch.device) -> "Beams":
        """Prompts of which nothing is written. start: what texts begin with, before new tokens."""
        params = [row.params for row in rows]
        count, most = len(rows), max(each.num_beams for each in params)
        longest = len(start) + max(each.max_new_tokens for each in params)

        def whole(numbers: Sequence[int]) -> torch.Tensor:
            return torch.tensor(numbers, dtype=torch.long, device=device)

        scores = torch.full((count, most), NONE, device=device)
        scores[:, 0] = 0.0  # at first all beams are one
        texts = torch.zeros((count, most, longest), dtype=torch.long, device=device)
        texts[:, :, : len(start)] = whole(start)
        return cls(
            beams=whole([each.num_beams for each in params]),
            limit=whole([each.max_new_tokens for each in params]),
            least=whole([each.min_new_tokens for each in params]),
            count=torch.zeros(count, dtype=torch.long, device=device),
            penalty=torch.tensor(
                [each.length_penalty for each in params], dtype=torch.float64, device=device
            ),
            scores=scores,
            texts=texts,
            best=torch.full_like(scores, NONE),
            found=texts.clone(),
            lengths=torch.zeros((count, most), dtype=torch.long, device=device),
            ended=torch.zeros((count, most), dtype=torch.bool, device=device),
        )

    def take(self, at: torch.Tensor) -> "Beams":
        """Those of some prompts, (m,)."""
        return Beams(*(tensor[at] for tensor in self._tensors()))

    def put(self, at: torch.Tensor, others: "Beams") -> "Beams":
        """The same with those of some prompts, (m,), replaced."""
        pairs = zip(self._tensors(), others._tensors(), strict=True)
        return Beams(*(mine.index_copy(0, at, theirs) for mine, theirs in pairs))

    def beside(self, others: "Beams") -> "Beams":
        """These prompts and others; the most beams and the longest texts of both have room."""
        mine, theirs = self._tensors(), others._tensors()
        return Beams(*(stacked(*pair) for pair in zip(mine, theirs, strict=True)))

    def _tensors(self) -> list[torch.Tensor]:
        return [getattr(self, field.name) for field in fields(self)]

    def best_texts(
        self, index: int, number: int, skipped: int
    ) -> tuple[list[list[int]], list[float]]:
        """The best texts of a prompt, without their first ``skipped`` tokens, and their scores."""
        tokens, lengths = self.found[index, :number].tolist(), self.lengths[index].tolist()
        texts = [each[skipped : skipped + n] for each, n in zip(tokens, lengths, strict=False)]
        return texts, self.best[index, :number].tolist()


def stacked(above: torch.Tensor, below: torch.Tensor) -> torch.Tensor:
    """Both, one above the other, as wide as the wider one; nothing is in what is between."""
    shape = [max(sizes) for sizes in zip(above.shape[1:], below.shape[1:], strict=True)]
    # What has no place among the beams of a prompt must never be one of its best.
    nothing = -torch.inf if above.dtype == torch.float32 else 0
    stacked = above.new_full((len(above) + len(below), *shape), nothing)
    for part, begin in ((above, 0), (below, len(above))):
        room = stacked[begin : begin + len(part)]
        for dim, size in enumerate(part.shape[1:], start=1):
            room = room.narrow(dim, 0, size)
        room.copy_(part)
    return stacked


@dataclass(frozen=True, slots=True)
class Chosen:
    """What a step has come to.

    tokens, parents: (n, K), what each beam says now, and which beam it goes on from. going: (n,),
    whether the search goes on.
    """

    beams: Beams
    tokens: torch.Tensor
    parents: torch.Tensor
    going: torch.Tensor


def choose_beams(
    logs: torch.Tensor,
    lanes: torch.Tensor,
    state: Beams,
    *,
    ends: torch.Tensor,
    skipped: int,
    stopping: Stopping,
) -> Chosen:
    """One more token for all beams, and what became of their texts.

    logs: log-probabilities after penalties, (rows, vocabulary). lanes: which row each beam goes on
    from, (n, K); any for what is no beam. ends: end tokens. skipped: tokens before the new ones.
    """
    count, most = state.scores.shape
    kept = max(2, 1 + len(ends)) * most
    ranks = torch.arange(kept, device=logs.device)
    is_beam = ranks[:most] < state.beams[:, None]
    # The best of each beam, then of each prompt: among them are the best of all.
    values, ids = logs.topk(min(kept, logs.shape[1]), dim=-1)
    each = values.shape[1]
    scores = (values[lanes] + state.scores[..., None]).masked_fill(~is_beam[..., None], -torch.inf)
    score, place = scores.view(count, -1).topk(kept, dim=-1)
    parent = place // each
    token = ids[lanes].view(count, -1).gather(1, place)

    written = state.count + 1
    last = written >= state.limit
    ends_here = (token[..., None] == ends).any(-1) | last[:, None]
    running, pick = (score + ends_here * NONE).topk(most, dim=-1)
    texts = state.texts.gather(1, _wide(parent, state.texts))
    at = (written + skipped - 1)[:, None, None].expand(-1, kept, 1)
    texts = texts.scatter(2, at, token[..., None])

    # Of the candidates only the best k may be among the texts.
    joins = ends_here & (ranks < state.beams[:, None])
    final = score / _power(written, state.penalty) + ~joins * NONE
    best, among = torch.cat([state.best, final], 1).topk(most, dim=-1)
    found = torch.cat([state.found, texts], 1).gather(1, _wide(among, state.found))
    lengths = torch.cat([state.lengths, written[:, None].expand(-1, kept)], 1).gather(1, among)
    ended = torch.cat([state.ended, joins], 1).gather(1, among)

    going = ~last & _may_improve(running, best, ended, is_beam, written, state, stopping)
    if stopping is True:
        going &= ~(ended | ~is_beam).all(1)
    after = Beams(
        beams=state.beams,
        limit=state.limit,
        least=state.least,
        count=written,
        penalty=state.penalty,
        scores=running,
        texts=texts.gather(1, _wide(pick, texts)),
        best=best,
        found=found,
        lengths=lengths,
        ended=ended,
    )
    return Chosen(after, token.gather(1, pick), parent.gather(1, pick), going)


def _may_improve(
    running: torch.Tensor,
    best: torch.Tensor,
    ended: torch.Tensor,
    is_beam: torch.Tensor,
    written: torch.Tensor,
    state: Beams,
    stopping: Stopping,
) -> torch.Tensor:
    """Whether a beam may still come to a better text than the worst that was found, (n,)."""
    length = written
    if stopping == "never":
        length = torch.where(state.penalty > 0, state.limit, written)
    hope = running[:, :1] / _power(length, state.penalty)
    worst = best.masked_fill(~is_beam, torch.inf).amin(1, keepdim=True)
    return ((hope > torch.where(ended, worst, NONE)) & is_beam).any(1)


def _power(length: torch.Tensor, penalty: torch.Tensor) -> torch.Tensor:
    """What sums are divided by, (n, 1): computed in float64, and rounded once."""
    return (length.double() ** penalty).float()[:, None]


def _wide(index: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
    """An index of texts, (n, m), for all of their tokens."""
    return index[..., None].expand(-1, -1, texts.shape[-1])
