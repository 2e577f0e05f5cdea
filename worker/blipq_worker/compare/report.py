"""The comparison as one HTML file, which needs nothing else: no network and no script."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import zip_longest
from math import isinf
from pathlib import Path

import blipq
from blipq.contract import Request
from blipq.files import whole_file
from blipq.pages import environment
from blipq_worker.compare.difference import SINGLE, Comparison, Pair, limit_of
from blipq_worker.compare.pictures import Pictures
from blipq_worker.demo.report import data_uri
from blipq_worker.kinds.registry import spec_of

#: Pairs that are shown side by side.
SHOWN = 24
#: What of a request is shown beside the picture.
_ASKED = ("prompt", "questions", "choices", "texts", "text", "head", "mode", "best_of")
#: Of one text; pages stay readable where a text of 4,096 characters was scored.
_LONGEST = 300


@dataclass(frozen=True, slots=True)
class Card:
    """A pair, its picture as a data: URI (None without one), and its request."""

    pair: Pair
    picture: str | None
    asked: Sequence[tuple[str, str]]

    @property
    def lines(self) -> list[tuple[str, str]]:
        """Both answers line by line."""
        return list(zip_longest(self.pair.served, self.pair.candidate, fillvalue=""))


def write_page(comparison: Comparison, pictures: Pictures, path: Path) -> None:
    """Writes the page, whole or not at all. Raises OSError."""
    with whole_file(path) as file:
        file.write(rendered(comparison, pictures).encode())


def rendered(comparison: Comparison, pictures: Pictures) -> str:
    """The comparison as HTML, with the pictures of its worst pairs."""
    made = environment("blipq_worker.compare")
    made.filters.update(short=short, number=number)
    return made.get_template("compare.html").render(
        comparison=comparison,
        cards=[_card(pair, pictures) for pair in comparison.worst(SHOWN)],
        changed=sum(pair.changed for pair in comparison.pairs),
        latency=[(name, *comparison.latency(share)) for name, share in QUANTILES],
        reasons=reasons,
        version=blipq.__version__,
        written=datetime.now().astimezone(),
    )


QUANTILES = (("half of the jobs within", 0.5), ("95 % within", 0.95))


def _card(pair: Pair, pictures: Pictures) -> Card:
    ref = spec_of(pair.case.request).image_of(pair.case.request)
    picture = None if ref is None else data_uri(pictures.shown(ref))
    return Card(pair, picture, list(_asked(pair.case.request)))


def _asked(request: Request) -> list[tuple[str, str]]:
    fields = request.model_dump(exclude_none=True, exclude_defaults=True)
    shown = [(name, fields[name]) for name in _ASKED if fields.get(name)]
    return [(name, each if isinstance(each, str) else _joined(each)) for name, each in shown]


def _joined(value: object) -> str:
    return "; ".join(map(str, value)) if isinstance(value, tuple | list) else str(value)


def reasons(pair: Pair) -> list[str]:
    """Why a pair counts as changed, in words."""
    found = [] if pair.failure is None else [f"no answer: {pair.failure}"]
    if pair.failure is None and pair.rewritten:
        found.append(f"{pair.rewritten} of {pair.texts} texts differ")
    for name in pair.beyond:
        what = "by" if name in SINGLE else "by the share"
        found.append(f"{name} {what} {number(pair.distances[name])} ({number(limit_of(name))})")
    return found


def short(text: str) -> str:
    """A text of bounded length."""
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."


def number(value: float | None) -> str:
    """A number of any size, in a few characters."""
    if value is None:
        return "–"
    return "no number" if isinf(value) else f"{value:.2g}"
