"""From scores to tokens for all slots at once: ``choosing`` as operations on tensors.

The same rules in the same order, with the same draws; nothing here depends on the parameters but
through tensors, so that sequences of all kinds share one graph.
"""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch

from blipq_worker.blip2.decoding.sampling import nucleus, race
from blipq_worker.blip2.decoding.sequences import RowParams
from blipq_worker.blip2.decoding.static.state import LONGEST_NGRAM, SlotState

#: Likeliest tokens that a draw looks at, by the largest top_k; what is more sorts the vocabulary.
_WINDOWS = (64, 1024)


class Variant(NamedTuple):
    """What a step must be able to do: its graph.

    penalties: repetition penalty and n-grams. window: the likeliest tokens that draws look at; 0
    where nobody draws.
    """

    penalties: bool = False
    window: int = 0

    @classmethod
    def of(cls, params: Iterable[RowParams], vocabulary: int) -> "Variant":
        """The least that serves all of these sequences."""
        return cls.all_of(
            cls(
                each.repetition_penalty != 1.0 or each.no_repeat_ngram_size > 0,
                _window(each.top_k, vocabulary) if each.do_sample else 0,
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
        )


def _window(top_k: int, vocabulary: int) -> int:
    wide = (size for size in _WINDOWS if 0 < top_k <= size < vocabulary)
    return next(wide, vocabulary)


class Sampler:
    """Chooses tokens. ends: end tokens. start: what penalties count as written before all others.

    Of a model with ``vocabulary`` tokens; no operation here waits for the device.
    """

    def __init__(
        self, ends: Sequence[int], start: Sequence[int], vocabulary: int, device: torch.device
    ) -> None:
        self.ends = torch.tensor(ends, dtype=torch.long, device=device)
        self.start = tuple(start)
        self.vocabulary = vocabulary
        self._ids = torch.arange(vocabulary, device=device)
        self._offsets = torch.arange(LONGEST_NGRAM - 1, device=device)

    def write(self, scores: torch.Tensor, state: SlotState, variant: Variant) -> torch.Tensor:
        """Chooses and writes the next tokens, (n,); -1 where scores are not finite numbers.

        scores: (n, vocabulary); it is changed. What an idle slot chooses means nothing.
        """
        tokens = self._choose(scores, state, variant)
        remember = len(self.start) if variant.penalties else None
        state.advance(tokens, self.ends, remember=remember)
        return tokens

    def _choose(self, scores: torch.Tensor, state: SlotState, variant: Variant) -> torch.Tensor:
        healthy = scores.amax(dim=-1).isfinite()
        if variant.penalties or variant.window:
            scores = scores.float()
        if variant.penalties:
            scores = self._penalized(scores, state)
        if len(self.ends):
            at_ends = scores.index_select(1, self.ends)
            short = (state.written < state.least)[:, None]
            scores.index_copy_(1, self.ends, at_ends.masked_fill(short, -math.inf))
        tokens = scores.argmax(dim=-1)
        if variant.window:
            tokens = torch.where(state.draws, self._draw(scores, state, variant.window), tokens)
        return torch.where(healthy, tokens, -1)

    def _penalized(self, scores: torch.Tensor, state: SlotState) -> torch.Tensor:
        penalty = state.repetition[:, None]
        penalized = torch.where(scores < 0, scores * penalty, scores / penalty)
        scores = torch.where(state.seen, penalized, scores)
        return scores.masked_fill_(self._repeated(state), -math.inf)

    def _repeated(self, state: SlotState) -> torch.Tensor:
        """What would end an n-gram that was written before, (n, vocabulary)."""
        size, history = state.ngram[:, None], state.history
        count, columns = history.shape
        length = (state.written + len(self.start)).clamp(max=columns)[:, None]
        # The tokens before each place, and those before the one to be written: the last is nearest.
        padded = torch.nn.functional.pad(history, (LONGEST_NGRAM - 1, 0), value=-1)
        before = padded.unfold(1, LONGEST_NGRAM - 1, 1)[:, :columns]
        last = padded.gather(1, length + self._offsets)
        beyond = self._offsets < LONGEST_NGRAM - size
        alike = ((before == last[:, None]) | beyond[:, None]).all(dim=-1)
        places = torch.arange(columns, device=history.device)
        alike &= (places < length) & (places >= size - 1) & (size > 0)
        # What is no repetition goes to a column behind the vocabulary.
        ids = torch.where(alike, history, self.vocabulary)
        found = torch.zeros(
            (count, self.vocabulary + 1), dtype=torch.bool, device=history.device
        ).scatter_(1, ids, True)
        return found[:, :-1]

    def _draw(self, scores: torch.Tensor, state: SlotState, window: int) -> torch.Tensor:
        """A token for each slot by temperature, top_k and top_p, (n,)."""
        temperature = torch.where(state.draws, state.temperature, 1.0)[:, None]
        scores = scores / temperature
        if window < self.vocabulary:
            values, ids = scores.topk(window, dim=-1)
        else:
            values, ids = scores.sort(dim=-1, descending=True)
        top_k = torch.where(state.top_k > 0, state.top_k, self.vocabulary)[:, None]
        values = values.masked_fill(self._ids[:window] >= top_k, -math.inf)
        # With top_k the probabilities are shared among its tokens, without it among all.
        total = torch.where(
            top_k < self.vocabulary, values.logsumexp(-1, True), scores.logsumexp(-1, True)
        )
        below = (values - total).exp().cumsum(-1)
        allowed = nucleus(values, below, state.top_p[:, None])
        place = race(allowed, ids, state.seed[:, None], state.written[:, None])
        return ids.gather(-1, place)[:, 0]
