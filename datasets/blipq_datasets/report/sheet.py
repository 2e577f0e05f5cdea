"""The sheet: one file that needs nothing else, not even a network or a script.

What it shows came from strangers, so every text is escaped and every picture is drawn anew.
"""

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import blipq
from blipq.contract import Status
from blipq.errors import BlipqError, InvalidRequest
from blipq.files import whole_file
from blipq.index.gallery import fetched, thumbnail
from blipq.pages import environment
from blipq.printable import printable
from blipq.s3.storage import Storage
from blipq_datasets.report.rows import Shown

_AT_ONCE = 4
#: Of one text, and filters by error code.
LONGEST, MOST_CODES = 300, 8


@dataclass(frozen=True, slots=True)
class Card:
    """A row, its picture as a data: URI (None without one), and the filters that show it."""

    row: Shown
    picture: str | None
    shown_by: Sequence[int]


@dataclass(frozen=True, slots=True)
class Filter:
    """Which cards are shown: their number, after all others."""

    name: str
    count: int


def write_sheet(
    rows: Iterable[Shown], facts: Mapping[str, Any], storage: Storage, path: Path
) -> int:
    """Writes the sheet, whole or not at all; how many rows it shows. facts: of the run.

    Raises InvalidRequest.
    """
    found = drawn(rows, storage)
    try:
        with whole_file(path) as file:
            file.write(rendered(found, facts).encode())
    except OSError as error:
        raise InvalidRequest(f"cannot write {path}: {error.strerror}") from None
    return len(found)


def drawn(rows: Iterable[Shown], storage: Storage) -> Sequence[tuple[Shown, str | None]]:
    """Rows with small pictures in place of their own, of which a few are held at a time."""
    made: list[tuple[Shown, Future[str | None]]] = []
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for row in rows:
            made.append((replace(row, data=None), pool.submit(_picture, row, storage)))
            if len(made) >= _AT_ONCE:
                made[-_AT_ONCE][1].result()
    return [(row, picture.result()) for row, picture in made]


def rendered(rows: Sequence[tuple[Shown, str | None]], facts: Mapping[str, Any]) -> str:
    """Rows that are drawn as HTML."""
    names = [_names(row) for row, _ in rows]
    every = list(dict.fromkeys(name for each in names for name in each))
    # Those that all rows have first, then errors: of many codes the first ones alone.
    kept = every[: MOST_CODES + 3]
    filters = [Filter(name, sum(name in each for each in names)) for name in kept]
    cards = [
        Card(row, picture, [kept.index(name) for name in each if name in kept])
        for (row, picture), each in zip(rows, names, strict=True)
    ]
    made = environment("blipq_datasets.report")
    made.filters.update(plain=printable, short=short)
    return made.get_template("sheet.html").render(
        cards=cards,
        filters=filters,
        version=blipq.__version__,
        written=datetime.now().astimezone(),
        **facts,
    )


def _names(row: Shown) -> list[str]:
    """The filters that show a row."""
    if row.status != Status.SUCCEEDED:
        return ["without an answer", *([row.code] if row.code else [row.status])]
    names = ["answered"]
    if row.repeated:
        names.append("repeated")
    if row.confidence is not None and row.confidence < 0.5:
        names.append("confidence below 0.5")
    return names


def _picture(row: Shown, storage: Storage) -> str | None:
    """A small picture; of one on the web none: nothing is fetched from strangers for a sheet."""
    try:
        if row.data is not None:
            return thumbnail(row.data)
        if row.image is not None and row.image.in_s3:
            return thumbnail(fetched(storage, row.image))
    except (BlipqError, ValueError):
        pass
    return None


def short(text: str) -> str:
    """A text of bounded length, with its control characters written out."""
    return printable(text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}...")
