"""Which rows a contact sheet shows, and what of them."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from blipq.contract import ImageRef, Status
from blipq_datasets.dataset import Dataset
from blipq_datasets.journal import DatasetJournal, Outcome
from blipq_datasets.output.answers import texts_of
from blipq_datasets.sources.rows import Cursor, Row

ItemT = TypeVar("ItemT")
#: Shards that rows are taken from, evenly spread, and rows at the beginning of each that count.
MOST_SHARDS, MOST_ROWS = 24, 1000
_FIELDS = ("prompt", "questions", "choices", "texts", "text")


@dataclass(frozen=True, slots=True)
class Shown:
    """A row and what became of it. data: its picture, where that passes through here.

    image: its picture in S3 or on the web. request: what it says beside the picture.
    """

    key: str
    status: str
    code: str | None
    message: str | None
    texts: list[str]
    confidence: float | None
    repeated: bool
    request: list[tuple[str, str]]
    data: bytes | None
    image: ImageRef | None


def rows_of(dataset: Dataset, journal: DatasetJournal, most: int) -> Iterator[Shown]:
    """Rows that have ended, in order: errors, up to the half, and others evenly spread."""
    begun = journal.begun()
    shards = _spread(begun, min(MOST_SHARDS, most))
    for number, (index, lines) in enumerate(shards):
        share = most * (number + 1) // len(shards) - most * number // len(shards)
        chosen = _chosen(list(journal.outcomes_of(lines[:MOST_ROWS])), share)
        if chosen:
            yield from _read(dataset, index, lines.start, chosen)


def _spread(items: list[ItemT], most: int) -> list[ItemT]:
    if len(items) <= most:
        return items
    return [items[number * len(items) // most] for number in range(most)]


def _chosen(ended: list[Outcome], most: int) -> dict[int, Outcome]:
    """Outcomes by their line."""
    wrong = [each for each in ended if each.status != Status.SUCCEEDED]
    right = [each for each in ended if each.status == Status.SUCCEEDED]
    errors = _spread(wrong, max(most // 2, most - len(right)))
    found = errors + _spread(right, most - len(errors))
    return {each.number: each for each in found}


def _read(
    dataset: Dataset, index: int, first: int, chosen: Mapping[int, Outcome]
) -> Iterator[Shown]:
    last = max(chosen)
    for number, (_, row) in enumerate(dataset.shards[index].rows(Cursor()), first):
        if number in chosen:
            yield _shown(dataset, index, row, chosen[number])
        if number >= last:
            return


def _shown(dataset: Dataset, index: int, row: Row, outcome: Outcome) -> Shown:
    entry, _ = dataset.entry(outcome.number, "", index, row)
    request = json.loads(entry.work)["request"] if entry.work else {}
    error = outcome.details.get("error") or {}
    result = outcome.details.get("result")
    texts, confidence = texts_of(result) if result else ([], None)
    return Shown(
        key=outcome.key or f"line {outcome.number}",
        status=outcome.status,
        code=error.get("code"),
        message=error.get("message"),
        texts=texts,
        confidence=confidence,
        repeated=outcome.is_duplicate,
        request=[*_fields_of(request)],
        data=row.data,
        image=row.image,
    )


def _fields_of(request: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name in _FIELDS:
        if value := request.get(name):
            yield name, value if isinstance(value, str) else "; ".join(map(str, value))
