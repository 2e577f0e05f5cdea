"""Beam search as transformers' ``generate`` does it, for many prompts at once.

What a step finds is weighed here: which beams go on, and which texts are among the best so far. It
is the arithmetic of ``_beam_search`` (transformers/generation/utils.py) in the same order and type,
on tensors whose shapes depend on no number in them: nothing is read back, so that one code serves
CPUs and steps in static slots. Prompts have beams of their own number k; K is the largest.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch

from blipq_worker.blip2.decoding.sequences import Row

#: The score of what is no candidate.
NONE = -1.0e9

#: When a prompt's search ends; ``early_stopping`` of transformers.
Stopping = Literal["never"] | bool


@dataclass(slots=True)
class Beams:
    """The beams of n prompts, and the k best texts of each that have ended.

    beams, limit, count: (n,), how many there are, the most new tokens of a text, and how many of
    them are written. penalty: (n,), float64, of the length. scores, texts: (n, K) and (n, K, T),
    the sums of log-probabilities of what is being written, best first, and its tokens, T5's start
    token included. logs: (n, K, T), the model's own log-probabilities of these, before penalties
    (see ``RowText``); 0 where nothing is written. best, found, found_logs, lengths, ended:
    (n, K), the same of the best texts with the penalty, (n, K, T), their tokens and (n, K, T) their
    logarithms; (n, K), new tokens; (n, K), False for what merely holds a place.
    """

    beams: torch.Tensor
    limit: torch.Tensor
    count: torch.Tensor
    penalty: torch.Tensor
    scores: torch.Tensor
    texts: torch.Tensor
    logs: torch.Tensor
    best: torch.Tensor
    found: torch.Tensor
    found_logs: torch.Tensor
    lengths: torch.Tensor
    ended: torch.Tensor

    @classmethod
    def fresh(cls, rows: Sequence[Row], start: Sequence[int], device: torch.device) -> "Beams":
        """Prompts of which nothing is written. start: what texts begin with, before new tokens."""
        params = [row.params for row in rows]

        def whole(numbers: Sequence[int]) -> torch.Tensor:
            return torch.tensor(numbers, dtype=torch.long, device=device)

        penalty = [each.length_penalty for each in params]
        return cls.begun(
            whole([each.num_beams for each in params]),
            whole([each.max_new_tokens for each in params]),
            torch.tensor(penalty, dtype=torch.float64, device=device),
            most=max(each.num_beams for each in params),
            longest=len(start) + max(each.max_new_tokens for each in params),
            start=start,
        )

    @classmethod
    def begun(
        cls,
        beams: torch.Tensor,
        limit: torch.Tensor,
        penalty: torch.Tensor,
        *,
        most: int,
        longest: int,
        start: Sequence[int] = (),
    ) -> "Beams":
        """The same of numbers on the device, (n,): up to ``most`` beams, ``longest`` tokens."""
        count, device = len(beams), beams.device
        scores = torch.full((count, most), NONE, device=device)
        scores[:, 0] = 0.0  # at first all beams are one
        texts = torch.zeros((count, most, longest), dtype=torch.long, device=device)
        for index, token in enumerate(start):
            texts[:, :, index] = token
        return cls(
            beams=beams,
            limit=limit,
            count=torch.zeros(count, dtype=torch.long, device=device),
            penalty=penalty,
            scores=scores,
            texts=texts,
            logs=torch.zeros_like(texts, dtype=torch.float32),
            best=torch.full_like(scores, NONE),
            found=texts.clone(),
            found_logs=torch.zeros_like(texts, dtype=torch.float32),
            lengths=torch.zeros((count, most), dtype=torch.long, device=device),
            ended=torch.zeros((count, most), dtype=torch.bool, device=device),
        )

    def take(self, at: torch.Tensor) -> "Beams":
        """Those of some prompts, (m,)."""
        return Beams(*(tensor[at] for tensor in self.tensors()))

    def first(self, count: int, most: int) -> "Beams":
        """Those of the first prompts, and of each the first beams: views."""
        return Beams(*(t[:count] if t.dim() == 1 else t[:count, :most] for t in self.tensors()))

    def where(self, chosen: torch.Tensor, others: "Beams") -> "Beams":
        """These of the prompts that are ``chosen``, (n,), and else the others."""

        def of_both(mine: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
            if mine is theirs:
                return mine
            return torch.where(chosen.view(-1, *[1] * (mine.dim() - 1)), mine, theirs)

        pairs = zip(self.tensors(), others.tensors(), strict=True)
        return Beams(*(of_both(*pair) for pair in pairs))

    def put(self, at: torch.Tensor, others: "Beams") -> "Beams":
        """The same with those of some prompts, (m,), replaced."""
        pairs = zip(self.tensors(), others.tensors(), strict=True)
        return Beams(*(mine.index_copy(0, at, theirs) for mine, theirs in pairs))

    def beside(self, others: "Beams") -> "Beams":
        """These prompts and others; the most beams and the longest texts of both have room."""
        mine, theirs = self.tensors(), others.tensors()
        return Beams(*(stacked(*pair) for pair in zip(mine, theirs, strict=True)))

    def tensors(self) -> list[torch.Tensor]:
        """All of these, in one order."""
        return [getattr(self, field.name) for field in fields(self)]

    def best_texts(
        self, index: int, number: int, skipped: int
    ) -> tuple[list[list[int]], list[float], list[list[float]]]:
        """The best texts of a prompt, without their first ``skipped`` tokens.

        Beside them their scores, and the logarithms of their tokens.
        """
        lengths = self.lengths[index, :number].tolist()

        def of_texts(tensor: torch.Tensor) -> list[list[Any]]:
            rows = tensor[index, :number].tolist()
            return [row[skipped : skipped + n] for row, n in zip(rows, lengths, strict=True)]

        return of_texts(self.found), self.best[index, :number].tolist(), of_texts(self.found_logs)


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
    """The result of a step.

    tokens, parents: (n, K), each beam's new token, and the beam it goes on from. going: (n,),
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
    noise: torch.Tensor | None = None,
    own: torch.Tensor | None = None,
) -> Chosen:
    """One more token for all beams, and what became of their texts.

    logs: log-probabilities after penalties, (rows, vocabulary). own: the same before penalties;
    None: there are none. lanes: which row each beam goes on
    from, (n, K); any for what is no beam. ends: end tokens. skipped: tokens before the new ones.
    noise: see ``_candidates``.
    """
    most = state.scores.shape[1]
    kept = candidates_of(1, ends) * most
    ranks = torch.arange(kept, device=logs.device)
    is_beam = ranks[:most] < state.beams[:, None]
    score, parent, token = _candidates(logs, noise, lanes, state, is_beam, kept)

    written = state.count + 1
    last = written >= state.limit
    ends_here = (token[..., None] == ends).any(-1) | last[:, None]
    running, pick = _first(score + ends_here * NONE, most, stable=noise is not None)
    texts = state.texts.gather(1, _wide(parent, state.texts))
    at = (written + skipped - 1)[:, None, None].expand(-1, kept, 1)
    texts = texts.scatter(2, at, token[..., None])
    likelihood = (logs if own is None else own)[lanes.gather(1, parent), token]
    texts_logs = state.logs.gather(1, _wide(parent, state.logs)).scatter(
        2, at, likelihood[..., None]
    )

    # Of the candidates only the best k may be among the texts.
    joins = ends_here & (ranks < state.beams[:, None])
    final = score / _power(written, state.penalty) + ~joins * NONE
    held = state.best
    if noise is not None:
        # Where few tokens may be drawn, texts of equal scores fill the pool: better than none.
        held = held.masked_fill(~state.ended, 2 * NONE)
    best, among = _first(torch.cat([held, final], 1), most, stable=noise is not None)
    found = torch.cat([state.found, texts], 1).gather(1, _wide(among, state.found))
    found_logs = torch.cat([state.found_logs, texts_logs], 1).gather(1, _wide(among, state.found))
    lengths = torch.cat([state.lengths, written[:, None].expand(-1, kept)], 1).gather(1, among)
    ended = torch.cat([state.ended, joins], 1).gather(1, among)

    going = ~last & _may_improve(running, best, ended, is_beam, written, state, stopping)
    if stopping is True:
        going &= ~(ended | ~is_beam).all(1)
    after = Beams(
        beams=state.beams,
        limit=state.limit,
        count=written,
        penalty=state.penalty,
        scores=running,
        texts=texts.gather(1, _wide(pick, texts)),
        logs=texts_logs.gather(1, _wide(pick, texts)),
        best=best,
        found=found,
        found_logs=found_logs,
        lengths=lengths,
        ended=ended,
    )
    return Chosen(after, token.gather(1, pick), parent.gather(1, pick), going)


def candidates_of(beams: int, ends: Sequence[int] | torch.Tensor) -> int:
    """Candidates of so many beams: if all of them may end, as many are left that go on."""
    return max(2, 1 + len(ends)) * beams


def _candidates(
    logs: torch.Tensor,
    noise: torch.Tensor | None,
    lanes: torch.Tensor,
    state: Beams,
    is_beam: torch.Tensor,
    kept: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scores, best first, beams and tokens of what may follow, each (n, kept).

    noise: Gumbel noise, (rows, vocabulary), float64, 0 for prompts that do not draw. The largest
    sums with it are a draw without replacement by the softmax of the scores.
    """
    count, most = state.scores.shape
    # The best of each beam, then of each prompt: among them are the best of all.
    values, ids = (logs if noise is None else logs + noise).topk(min(kept, logs.shape[1]), dim=-1)
    each = values.shape[1]
    if noise is not None:
        values = logs.gather(1, ids)
    scores = (values[lanes] + state.scores[..., None]).masked_fill(~is_beam[..., None], -torch.inf)
    scores = scores.view(count, -1)
    if noise is None:
        score, place = scores.topk(kept, dim=-1)
    else:
        keys = scores + noise.gather(1, ids)[lanes].view(count, -1)
        place = keys.topk(kept, dim=-1).indices
        # A prompt draws as many as its own beams need: more, of wider neighbours, would be another
        # draw.
        drawn = torch.arange(kept, device=logs.device) < (state.beams * (kept // most))[:, None]
        score, order = _first(scores.gather(1, place).where(drawn, -torch.inf), kept, stable=True)
        place = place.gather(1, order)
    return score, place // each, ids[lanes].view(count, -1).gather(1, place)


def _first(scores: torch.Tensor, number: int, *, stable: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest scores, (n, number), and where they are.

    stable: of equal ones the first comes first, so that no neighbour's width decides.
    """
    if not stable:
        values, places = scores.topk(number, dim=-1)
        return values, places
    values, places = scores.sort(dim=-1, descending=True, stable=True)
    return values[:, :number], places[:, :number]


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
