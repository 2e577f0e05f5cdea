"""Writes each shard as soon as all its rows have ended, in order, once."""

import itertools
import json
from collections import Counter
from collections.abc import Sequence

from blipq.bulk.journal import DUPLICATE
from blipq.errors import BlipqError, InvalidRequest
from blipq_datasets.journal import DatasetJournal, Outcome
from blipq_datasets.output.answers import with_answers
from blipq_datasets.output.targets import Target
from blipq_datasets.output.writers import ENDINGS, writer_of
from blipq_datasets.recipe import Format
from blipq_datasets.sources.rows import Shard

STATS = "_stats.json"


class Output:
    """The answered shards of one bulk. The journal knows how many are written.

    A shard that its journal has not noted may be there from a process that was killed right behind
    writing it: it is whole, and is not written again.
    """

    def __init__(
        self,
        journal: DatasetJournal,
        shards: Sequence[Shard],
        target: Target,
        format: Format,
        *,
        escape_formulas: bool,
    ) -> None:
        self._journal = journal
        self._shards = shards
        self._target = target
        self._format = format
        self._escape_formulas = escape_formulas
        self._written: int = journal.fact("written") or 0

    def check(self) -> None:
        """Raises InvalidRequest for a place that holds other files of these names."""
        if self._journal.fact("writes"):
            return
        for name in (STATS, *map(self._name, range(len(self._shards)))):
            if self._target.has(name):
                raise InvalidRequest(f"there is a {name} already: give another --output")
        self._journal.note(writes=True)

    def write_due(self) -> None:
        """Writes the shards whose rows have all ended. Raises S3Unavailable."""
        while self._written < len(self._shards):
            lines = self._journal.lines_of(self._written)
            if lines is None:
                return
            name = self._name(self._written)
            if not self._target.has(name):
                self._write(self._shards[self._written], name, lines)
            self._written += 1
            self._journal.note(written=self._written)

    def finish(self) -> None:
        """Writes what is due and, if that is all there is, the figures."""
        self.write_due()
        if self._written == len(self._shards):
            with self._target.writing(STATS) as path:
                path.write_text(json.dumps(self._stats(), indent=1) + "\n")

    def _name(self, shard: int) -> str:
        return self._shards[shard].stem + ENDINGS[self._format]

    def _write(self, shard: Shard, name: str, lines: range) -> None:
        outcomes = self._journal.outcomes_of(lines)
        fields = self._journal.shard(self._written)[1] if lines else {}
        with self._target.writing(name) as path:
            writer = writer_of(
                self._format, path, name=shard.stem, escape_formulas=self._escape_formulas
            )
            try:
                pictures = self._format == "webdataset"
                for part in shard.parts(fields, pictures=pictures, lines=len(lines)):
                    found = list(itertools.islice(outcomes, len(part.columns)))
                    _check_same(shard, len(found) == len(part.columns))
                    writer.write(with_answers(part.columns, found), part.pictures)
                _check_same(shard, next(outcomes, None) is None)
            finally:
                writer.close()

    def _stats(self) -> dict[str, object]:
        lines = range(1, self._journal.fact("lines") + 1)
        statuses: Counter[str] = Counter()
        errors: Counter[str] = Counter()
        duplicates = 0
        for outcome in self._journal.outcomes_of(lines):
            statuses[outcome.status] += 1
            duplicates += outcome.is_duplicate
            if code := _code(outcome):
                errors[code] += 1
        return {
            "rows": len(lines),
            "shards": len(self._shards),
            "statuses": dict(statuses),
            DUPLICATE: duplicates,
            "errors": dict(errors),
            "took": self._journal.took(),
            "estimate": self._journal.fact("estimate"),
        }


def _code(outcome: Outcome) -> str | None:
    code: str | None = (outcome.details.get("error") or {}).get("code")
    return code


def _check_same(shard: Shard, same: bool) -> None:
    if not same:
        raise BlipqError(f"{shard.stem} has other rows than were submitted: it has changed")
