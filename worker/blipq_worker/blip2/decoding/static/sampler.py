"""From scores to tokens for all slots at once: ``sampling`` as operations on tensors.

The same rules in the same order, with the same draws; nothing here depends on the parameters but
through tensors, so that sequences of all kinds share one graph. Those of beams have been through
the softmax before: their sums count.
"""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch

from blipq_worker.blip2.decoding.beams import Beams, Stopping, candidates_of
from blipq_worker.blip2.decoding.sampling import gumbel, nucleus, race
from blipq_worker.blip2.decoding.sequences import RowParams
from blipq_worker.blip2.decoding.static.groups import MOST_BEAMS, WIDTHS, Found, SlotGroups
from blipq_worker.blip2.decoding.static.state import LONGEST_NGRAM, SlotState

#: Likeliest tokens that a draw looks at, by the largest top_k; what is more sorts the vocabulary.
_WINDOWS = (64, 1024)


class Variant(NamedTuple):
    """What a step must be able to do: its graph.

    penalties: repetition penalty and n-grams. window: the likeliest tokens that draws look at; 0
    where nobody draws. beams: the most of a search, of ``WIDTHS``; 0 where there is none.
    """

    penalties: bool = False
    window: int = 0
    beams: int = 0

    @classmethod
    def of(cls, params: Iterable[RowParams], vocabulary: int) -> "Variant":
        """The least that serves all of these sequences."""
        return cls.all_of(
            cls(
                each.repetition_penalty != 1.0 or each.no_repeat_ngram_size > 0,
                _window(each.top_k, vocabulary) if each.do_sample else 0,
                _width(each.num_beams),
            )
            for each in params
        )

    @classmethod
    def all_of(cls, variants: "Iterable[Variant]") -> "Variant":
        """The least that is all of these."""
        all_of_them = set(variants)
        return cls(
            any(each.penalties for each in all_of_them),
            max((each.window for each in all_of_them), default=0),
            max((each.beams for each in all_of_them), default=0),
        )


def _window(top_k: int, vocabulary: int) -> int:
    wide = (size for size in _WINDOWS if 0 < top_k <= size < vocabulary)
    return next(wide, vocabulary)


def _width(beams: int) -> int:
    return next(width for width in WIDTHS if width >= beams) if beams > 1 else 0


class _Likeliest(NamedTuple):
    """The tokens that draws look at, (n, window), likeliest first.

    values: their scores by temperature. scaled: the same of all tokens, (n, vocabulary).
    """

    values: torch.Tensor
    ids: torch.Tensor
    scaled: torch.Tensor


class Sampler:
    """Chooses tokens. ends: end tokens. start: what penalties count as written before all others.

    Of a model with ``vocabulary`` tokens; no operation here waits for the device. stopping: when
    searches with beams end.
    """

    def __init__(
        self,
        ends: Sequence[int],
        start: Sequence[int],
        vocabulary: int,
        device: torch.device,
        stopping: Stopping = False,
    ) -> None:
        self.ends = torch.tensor(ends, dtype=torch.long, device=device)
        self.start = tuple(start)
        self.vocabulary = vocabulary
        self._stopping = stopping
        self._ids = torch.arange(vocabulary, device=device)
        self._offsets = torch.arange(LONGEST_NGRAM - 1, device=device)

    def begun(self, state: SlotState) -> SlotGroups:
        """Groups with the beams of sequences about to write their first tokens."""
        columns = state.history.shape[1]
        beams = Beams.begun(
            state.beams,
            state.limit,
            state.length,
            most=MOST_BEAMS,
            longest=columns,
            start=self.start,
        )
        return SlotGroups.begun(beams)

    def write(
        self,
        scores: torch.Tensor,
        state: SlotState,
        variant: Variant,
        groups: SlotGroups | None = None,
    ) -> torch.Tensor:
        """Chooses and writes the next tokens. Returns them and their logarithms, (n, 2), float64.

        -1 where scores are not finite numbers. scores: (n, vocabulary); it is changed. What an idle
        slot chooses means nothing. groups: of beams in these slots; for theirs it returns
        ``Found.outcome``, and no logarithm. None: there is none.
        """
        healthy = scores.amax(dim=-1).isfinite()
        own = torch.log_softmax(scores, dim=-1, dtype=torch.float32)
        scores = self._by_rules(scores, own, state, variant, groups)
        tokens, likeliest = scores.argmax(dim=-1), None
        if variant.window:
            likeliest = self._likeliest(scores, state, variant.window)
            tokens = torch.where(state.draws, self._draw(likeliest, state), tokens)
        ended = (tokens[:, None] == self.ends).any(-1) | (state.written + 1 >= state.limit)
        chosen, going = torch.where(healthy, tokens, -1), healthy & ~ended
        remember = len(self.start) if variant.penalties else None
        logs = own.gather(-1, tokens[:, None])[:, 0]
        if groups is None:
            result = torch.stack([chosen.double(), logs.double()], dim=1)
            state.advance(tokens, going, remember=remember)
            return result
        found, among = self._search(scores, likeliest, own, healthy, state, groups), groups.among
        tokens = torch.where(among, found.tokens, tokens)
        chosen = torch.where(among, found.outcome, chosen)
        result = torch.stack([chosen.double(), logs.double()], dim=1)
        # Both or none: only the first of these takes memory, and before it writes anything.
        state.advance(tokens, torch.where(among, found.going, going), remember=remember)
        groups.take(found.groups)
        return result

    def _search(
        self,
        logs: torch.Tensor,
        likeliest: _Likeliest | None,
        own: torch.Tensor,
        healthy: torch.Tensor,
        state: SlotState,
        groups: SlotGroups,
    ) -> Found:
        noise = None
        if likeliest is not None:
            logs, noise = self._among_what_may_be_drawn(logs, likeliest, state, groups)
        return groups.search(
            logs,
            noise,
            own,
            healthy,
            state.live,
            state.positions,
            ends=self.ends,
            skipped=len(self.start),
            stopping=self._stopping,
        )

    def _by_rules(
        self,
        scores: torch.Tensor,
        own: torch.Tensor,
        state: SlotState,
        variant: Variant,
        groups: SlotGroups | None,
    ) -> torch.Tensor:
        """Scores after penalties and the shortest length; of beams their logarithms, ``own``."""
        if variant != Variant():
            scores = scores.float()
        if groups is not None:
            scores = torch.where(groups.among[:, None], own, scores)
        if variant.penalties:
            scores = self._penalized(scores, state, groups)
        if len(self.ends):
            at_ends = scores.index_select(1, self.ends)
            short = (state.written < state.least)[:, None]
            scores.index_copy_(1, self.ends, at_ends.masked_fill(short, -math.inf))
        return scores

    def _penalized(
        self, scores: torch.Tensor, state: SlotState, groups: SlotGroups | None
    ) -> torch.Tensor:
        history, seen = state.history, state.seen
        length = (state.written + len(self.start)).clamp(max=history.shape[1])[:, None]
        if groups is not None:
            history = torch.where(groups.among[:, None], groups.texts, history)
            columns = torch.arange(history.shape[1], device=history.device)
            seen = self._found_in(history, columns < length)
        penalty = state.repetition[:, None]
        penalized = torch.where(scores < 0, scores * penalty, scores / penalty)
        scores = torch.where(seen, penalized, scores)
        return scores.masked_fill_(self._repeated(history, length, state.ngram), -math.inf)

    def _repeated(
        self, history: torch.Tensor, length: torch.Tensor, ngram: torch.Tensor
    ) -> torch.Tensor:
        """What would end an n-gram that was written before, (n, vocabulary).

        length: of what counts of ``history``, (n, 1).
        """
        size, columns = ngram[:, None], history.shape[1]
        # The tokens before each place, and those before the one to be written: the last is nearest.
        padded = torch.nn.functional.pad(history, (LONGEST_NGRAM - 1, 0), value=-1)
        before = padded.unfold(1, LONGEST_NGRAM - 1, 1)[:, :columns]
        last = padded.gather(1, length + self._offsets)
        beyond = self._offsets < LONGEST_NGRAM - size
        alike = ((before == last[:, None]) | beyond[:, None]).all(dim=-1)
        places = torch.arange(columns, device=history.device)
        alike &= (places < length) & (places >= size - 1) & (size > 0)
        return self._found_in(history, alike)

    def _found_in(self, history: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """Which tokens are at some places of ``history``, (n, vocabulary); both (n, columns)."""
        # All others go to a column behind the vocabulary.
        ids = torch.where(places, history, self.vocabulary)
        shape = len(history), self.vocabulary + 1
        found = torch.zeros(shape, dtype=torch.bool, device=history.device).scatter_(1, ids, True)
        return found[:, :-1]

    def _likeliest(self, scores: torch.Tensor, state: SlotState, window: int) -> _Likeliest:
        """The likeliest tokens of each slot by its temperature."""
        temperature = torch.where(state.draws, state.temperature, 1.0)[:, None]
        scaled = scores / temperature
        if window < self.vocabulary:
            values, ids = scaled.topk(window, dim=-1)
        else:
            values, ids = scaled.sort(dim=-1, descending=True)
        return _Likeliest(values, ids, scaled)

    def _draw(self, likeliest: _Likeliest, state: SlotState) -> torch.Tensor:
        """A token for each slot by temperature, top_k and top_p, (n,)."""
        values, ids, scaled = likeliest
        top_k = torch.where(state.top_k > 0, state.top_k, self.vocabulary)[:, None]
        values = values.masked_fill(self._ids[: values.shape[1]] >= top_k, -math.inf)
        # With top_k the probabilities are shared among its tokens, without it among all.
        total = torch.where(
            top_k < self.vocabulary, values.logsumexp(-1, True), scaled.logsumexp(-1, True)
        )
        below = (values - total).exp().cumsum(-1)
        allowed = nucleus(values, below, state.top_p[:, None])
        place = race(allowed, ids, state.seed[:, None], state.written[:, None])
        return ids.gather(-1, place)[:, 0]

    def _among_what_may_be_drawn(
        self, logs: torch.Tensor, likeliest: _Likeliest, state: SlotState, groups: SlotGroups
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logarithms and noise of beams, (n, vocabulary): where they draw, of what they may.

        See ``sampling.warped``, and ``choose_beams`` for what becomes of the noise.
        """
        values, ids, _ = likeliest
        least, ranks = candidates_of(1, self.ends), self._ids[: values.shape[1]]
        top_k = torch.where(state.top_k > 0, state.top_k.clamp(min=least), self.vocabulary)
        values = values.masked_fill(ranks >= top_k[:, None], -math.inf)
        allowed = nucleus(values, values.softmax(-1).cumsum(-1), state.top_p[:, None])
        allowed = torch.where(ranks < least, values, allowed)
        draws = (groups.among & state.draws)[:, None]
        nothing = torch.full_like(logs, -math.inf)
        drawable = torch.where(draws, nothing.scatter(1, ids, allowed), logs)
        seeds, steps, beams = (each[:, None] for each in (state.seed, state.written, groups.rank))
        noise = gumbel(ids, seeds, steps, beams) * draws
        return drawable, torch.zeros_like(logs, dtype=torch.float64).scatter(1, ids, noise)
