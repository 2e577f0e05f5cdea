"""From logits to tokens, each row by its own parameters.

The order is that of transformers' ``generate``: penalties, shortest length, temperature, top_k,
top_p. Penalties see new tokens only (and T5's start token), as in LAVIS.

A draw is a race: every allowed token gets a time from its probability and a hash of (the row's
seed, its step, the token), and the first one wins. So a draw depends on nothing but these: neither
on the rows beside it nor on how many tokens were looked at.
"""

import math
from collections.abc import Sequence

import torch
from transformers import NoRepeatNGramLogitsProcessor, RepetitionPenaltyLogitsProcessor

from blipq_worker.blip2.decoding.sequences import Row

#: Tokens looked at first where top_k is off. Sorting a whole vocabulary costs more than a small
#: model's forward pass, and nearly always the most likely tokens hold top_p of the probability.
WINDOW = 512
#: Of a row of scores, to find the largest. OPT's and T5's vocabularies can be cut into as many.
PARTS = 32


class ScoresError(RuntimeError):
    """The model's scores are not numbers: it overflowed, or its weights are damaged."""


def choose(
    logits: torch.Tensor, rows: Sequence[Row], *, ends: Sequence[int], start: Sequence[int]
) -> list[tuple[int, float]]:
    """The next token of each row from its logits, (rows, vocabulary), and its log-probability.

    That is the model's own (see ``RowText``). ends: end tokens. start: tokens that penalties count
    as written before all others. Raises ScoresError if the scores of a row are not finite.
    """
    own = torch.log_softmax(logits, dim=-1, dtype=torch.float32)
    tokens = likeliest(logits.float())
    # Of the likeliest token it is a number unless the largest score is none: a pass less than amax.
    healthy = own.gather(-1, tokens[:, None])[:, 0].isfinite()
    ruled = [index for index, row in enumerate(rows) if _has_rules(row)]
    if ruled:
        scores = logits[ruled].float()  # a copy, of these rows alone
        tokens[ruled] = _by_rules(scores, [rows[index] for index in ruled], ends, start)
    logs = own.gather(-1, tokens[:, None])[:, 0]
    # Token ids are exact in float64: the step's only wait is for both.
    found = torch.stack([torch.where(healthy, tokens, -1).double(), logs.double()]).tolist()
    if -1.0 in found[0]:
        raise ScoresError("the model's scores are not numbers")
    return [(int(token), log) for token, log in zip(*found, strict=True)]


def likeliest(scores: torch.Tensor) -> torch.Tensor:
    """``argmax`` of each row of scores, (rows, vocabulary), float32: (rows,).

    On a CPU torch's argmax looks at one number after the other, its amax at many: 32 parts of a row
    are compared by their largest first. Of equal ones the first wins, as in argmax.
    """
    rows, vocabulary = scores.shape
    if scores.device.type != "cpu" or vocabulary % PARTS:
        return scores.argmax(dim=-1)
    parts = scores.reshape(rows, PARTS, vocabulary // PARTS)
    first = parts.amax(dim=-1).argmax(dim=-1)
    place = parts[torch.arange(rows), first].argmax(dim=-1)
    return first * parts.shape[-1] + place


def _has_rules(row: Row) -> bool:
    """Whether the next token may be another than the likeliest one."""
    return is_penalized(row) or row.params.do_sample or _is_short(row)


def _is_short(row: Row) -> bool:
    return len(row.tokens) < row.params.min_new_tokens


def _by_rules(
    scores: torch.Tensor, rows: Sequence[Row], ends: Sequence[int], start: Sequence[int]
) -> torch.Tensor:
    """The next tokens, (rows,), from scores, (rows, vocabulary), float32, which it changes."""
    for index, row in enumerate(rows):
        if is_penalized(row):
            scores[index] = penalized(scores[index][None], row, [[*start, *row.tokens]])[0]
    short = [index for index, row in enumerate(rows) if _is_short(row)]
    if short:
        banned = torch.tensor(ends, dtype=torch.long, device=scores.device)
        scores[torch.tensor(short, device=scores.device)[:, None], banned] = -math.inf
    tokens = likeliest(scores)
    drawn = [index for index, row in enumerate(rows) if row.params.do_sample]
    if drawn:
        tokens[drawn] = _draw(scores[drawn], [rows[index] for index in drawn])
    return tokens


def is_penalized(row: Row) -> bool:
    """Whether what was written changes what may follow."""
    return row.params.repetition_penalty != 1.0 or row.params.no_repeat_ngram_size > 0


def penalized(
    scores: torch.Tensor, row: Row, written: Sequence[Sequence[int]] | torch.Tensor
) -> torch.Tensor:
    """Scores, (n, vocabulary), after the penalties of a row for what was written, (n, tokens)."""
    params = row.params
    before = torch.as_tensor(written, dtype=torch.long, device=scores.device)
    if params.repetition_penalty != 1.0:
        scores = RepetitionPenaltyLogitsProcessor(params.repetition_penalty)(before, scores)
    if params.no_repeat_ngram_size > 0:
        scores = NoRepeatNGramLogitsProcessor(params.no_repeat_ngram_size)(before, scores)
    return scores


def _draw(scores: torch.Tensor, rows: Sequence[Row]) -> torch.Tensor:
    """A token for each row by temperature, top_k and top_p."""
    device = scores.device
    params = [row.params for row in rows]
    scores = scores / torch.tensor([[each.temperature] for each in params], device=device)
    vocabulary = scores.shape[-1]
    window = max(min(each.top_k or WINDOW, vocabulary) for each in params)
    values, ids = scores.topk(window, dim=-1)
    top_k = torch.tensor([[each.top_k or vocabulary] for each in params], device=device)
    top_p = torch.tensor([[each.top_p] for each in params], device=device)
    values = values.masked_fill(torch.arange(window, device=device) >= top_k, -math.inf)
    # With top_k the probabilities are shared among its tokens, without it among all.
    total = torch.where(top_k < vocabulary, values.logsumexp(-1, True), scores.logsumexp(-1, True))
    below = (values - total).exp().cumsum(-1)
    allowed = nucleus(values, below, top_p)
    tokens = ids.gather(-1, _race(allowed, ids, rows))[:, 0]
    if window < vocabulary and not all(each.top_k for each in params):
        # top_p may reach beyond the window where top_k does not end before it.
        wide = ((below[:, -1:] < top_p) & (top_k == vocabulary))[:, 0].nonzero()[:, 0].tolist()
        if wide:
            tokens[wide] = _draw_widely(scores[wide], [rows[index] for index in wide])
    return tokens


def _draw_widely(scores: torch.Tensor, rows: Sequence[Row]) -> torch.Tensor:
    """A token for each row by top_p over the whole vocabulary."""
    top_p = torch.tensor([[row.params.top_p] for row in rows], device=scores.device)
    values, ids = scores.sort(dim=-1, descending=True)
    allowed = nucleus(values, values.softmax(-1).cumsum(-1), top_p)
    return ids.gather(-1, _race(allowed, ids, rows))[:, 0]


def nucleus(values: torch.Tensor, below: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """Sorted scores without those behind which more likely tokens already hold ``top_p``."""
    before = torch.nn.functional.pad(below[:, :-1], (1, 0))
    return values.masked_fill((before >= top_p) & (top_p < 1.0), -math.inf)


def _race(scores: torch.Tensor, ids: torch.Tensor, rows: Sequence[Row]) -> torch.Tensor:
    seeds = torch.tensor([[row.seed] for row in rows], device=ids.device)
    steps = torch.tensor([[len(row.tokens)] for row in rows], device=ids.device)
    return race(scores, ids, seeds, steps)


def race(
    scores: torch.Tensor, ids: torch.Tensor, seeds: torch.Tensor, steps: torch.Tensor
) -> torch.Tensor:
    """Where in each row the winner is, (rows, 1): a draw by the softmax of ``scores``.

    scores: of the tokens ``ids``, both (rows, tokens). seeds, steps: (rows, 1), 64-bit integers.
    The largest score plus Gumbel noise, which is the first of exponential times.
    """
    return (scores.double() + gumbel(ids, seeds, steps)).argmax(dim=-1, keepdim=True)


def gumbel(
    ids: torch.Tensor, seeds: torch.Tensor, steps: torch.Tensor, ranks: torch.Tensor | None = None
) -> torch.Tensor:
    """Gumbel noise of tokens, (rows, tokens), float64. ranks: (rows, 1), of beams; None: alone."""
    state = _mixed(_mixed(seeds) + steps)
    if ranks is not None:
        state = _mixed(state + ranks)
    return -(-_uniform(_mixed(state + ids)).log()).log()


def warped(scores: torch.Tensor, row: Row, least: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What the beams of a row may draw from: scores, likeliest first, and tokens, (beams, tokens).

    least: tokens that top_k and top_p leave in any case.
    """
    params, vocabulary = row.params, scores.shape[-1]
    number = min(max(params.top_k, least), vocabulary) if params.top_k else vocabulary
    values, ids = (scores / params.temperature).topk(number, dim=-1)
    top_p = torch.tensor(params.top_p, device=scores.device)
    allowed = nucleus(values, values.softmax(-1).cumsum(-1), top_p)
    allowed[:, :least] = values[:, :least]
    return allowed, ids


def _mixed(numbers: torch.Tensor) -> torch.Tensor:
    """Scrambles 64-bit integers: the finalizer of SplitMix64 (Steele et al., OOPSLA 2014)."""
    numbers = numbers * -7046029254386353131 + -7046029254386353131  # 2^64 over the golden ratio
    numbers = (numbers ^ ((numbers >> 30) & (2**34 - 1))) * -4658895280553007687
    numbers = (numbers ^ ((numbers >> 27) & (2**37 - 1))) * -7723592293110705685
    return numbers ^ ((numbers >> 31) & (2**33 - 1))


def _uniform(numbers: torch.Tensor) -> torch.Tensor:
    """Integers to float64 between 0 and 1, neither of them reached."""
    return (((numbers >> 12) & (2**52 - 1)).double() + 0.5) * 2.0**-52
