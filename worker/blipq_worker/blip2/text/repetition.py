"""Texts that repeat themselves without end: noticed from their token ids alone, as they grow.

Two rules. Period: the last tokens are one phrase over and over. Share: of the last three-token
phrases most were written before, where a phrase varies too much to have a period. Both are chosen
so that lists and numbers, which repeat a little, pass: one billion is `1` and three times `,` and
`000`.
"""

from collections.abc import Sequence

#: The longest phrase whose repetition counts as a period, in tokens.
LONGEST_PERIOD = 16
#: A period is a loop once it was written so often, in so many tokens at least.
TIMES, LEAST = 4, 16
#: Of so many last tokens, this share of all three-token phrases must have been written before.
SHARE_OF, SHARE = 40, 0.6
_PHRASE = 3
#: Lengths at which a growing text is examined are multiples of this.
EVERY = 4


def kept(tokens: Sequence[int], least: int = 0) -> int | None:
    """How many of these tokens say something, where the last ones are a loop; else None.

    A loop keeps its phrase once. least: what must be kept is no loop. Pure; 1 <= the answer.
    """
    found = _by_period(tokens)
    if found is None:
        found = _by_share(tokens)
    return found if found is not None and found >= max(1, least) else None


def is_due(length: int) -> bool:
    """Whether a growing text of this length is to be examined."""
    return length >= LEAST and length % EVERY == 0


def _by_period(tokens: Sequence[int]) -> int | None:
    """Up to the end of the first of at least TIMES equal phrases at the end of a text."""
    length = len(tokens)
    if length < LEAST:
        return None
    last = tokens[-1]
    for period in range(1, min(LONGEST_PERIOD, length // TIMES) + 1):
        # One comparison rules out nearly every period.
        if tokens[-1 - period] != last:
            continue
        at = length - period - 1
        while at >= 0 and tokens[at] == tokens[at + period]:
            at -= 1
        begin = at + 1
        if length - begin >= max(TIMES * period, LEAST):
            return begin + period
    return None


def _by_share(tokens: Sequence[int]) -> int | None:
    """Up to the first phrase that was written before, where most of the last ones were."""
    if len(tokens) < SHARE_OF:
        return None
    phrases = [tuple(tokens[at : at + _PHRASE]) for at in range(len(tokens) - _PHRASE + 1)]
    seen: set[tuple[int, ...]] = set()
    again = []
    for phrase in phrases:
        again.append(phrase in seen)
        seen.add(phrase)
    last = again[-(SHARE_OF - _PHRASE + 1) :]
    if sum(last) < SHARE * len(last):
        return None
    return len(again) - len(last) + last.index(True)
