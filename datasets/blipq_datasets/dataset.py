"""The rows of all shards as the lines of a bulk."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import accumulate
from typing import Any

from blipq.bulk.manifest import Entry
from blipq.errors import InvalidRequest
from blipq_datasets.fields import kinds_of
from blipq_datasets.journal import RowEntry
from blipq_datasets.recipe import Recipe
from blipq_datasets.sources.columns import LONGEST_KEY
from blipq_datasets.sources.rows import END, Cursor, Row, Shard, held
from blipq_datasets.uploads import Uploads


class Dataset:
    """A manifest (``blipq.bulk.manifest.Manifest``) whose lines are rows.

    ``uploads``: where pictures go that workers cannot reach.
    """

    size = None

    def __init__(
        self, name: str, shards: Sequence[Shard], recipe: Recipe, uploads: Uploads
    ) -> None:
        self.name = name
        self.shards = shards
        self._recipe = recipe
        self._options = recipe.options_of_all
        self.uploads = uploads

    def of(self, shards: Sequence[Shard]) -> "Dataset":
        """The same of other shards."""
        return Dataset(self.name, shards, self._recipe, self.uploads)

    @property
    def version(self) -> str:
        """Changes with the shards and the requests."""
        requests = self._recipe.model_dump(mode="json", exclude={"to", "output", "escape_formulas"})
        shards = [(shard.stem, shard.version) for shard in self.shards]
        return _digest([shards, requests])

    def entries(
        self, number: int, position: str, is_known: Callable[[str], bool] = lambda mark: False
    ) -> Iterator[Entry]:
        """The lines behind number ``number``, which ended at ``position``.

        is_known: a request that is known needs no upload. Raises S3Unavailable.
        """
        first, *place = json.loads(position) if position else (0, 0, 0)
        cursor = Cursor(*place)
        for index in range(first, len(self.shards)):
            rows = () if cursor.offset == END else self.shards[index].rows(cursor)
            for group in held(rows):
                entries, pictures = [], {}
                for after, row in group:
                    number += 1
                    entry, target = self.entry(number, json.dumps([index, *after]), index, row)
                    entries.append(entry)
                    if target and row.data and entry.mark and not is_known(entry.mark):
                        pictures[number] = target, row.data
                self.uploads.put(pictures)
                yield from entries
            cursor = Cursor()

    def share(self, position: str) -> float | None:
        """How much of the shards' bytes lies before a position, 0 to 1. Raises S3Unavailable."""
        if not position:
            return None
        index, *place = json.loads(position)
        shard = self.shards[index]
        before = self._before[index] + shard.share(Cursor(*place)) * shard.size
        return before / self._before[-1] if self._before[-1] else None

    @cached_property
    def _before(self) -> list[int]:
        """Bytes before each shard, and of all."""
        return [0, *accumulate(shard.size for shard in self.shards)]

    def preview(self) -> Iterator[Entry]:
        """The lines from the first on; nothing is uploaded."""
        return self.entries(0, "", lambda mark: True)

    def entry(
        self, number: int, position: str, shard: int, row: Row
    ) -> tuple[RowEntry, str | None]:
        """A row's line, and where its picture is to be uploaded to."""
        fields = kinds_of(row.columns)
        image, place = self._image(number, row)
        try:
            if row.error is not None or row.key is None:
                raise InvalidRequest(row.error or "the row has no key")
            if not 0 < len(row.key) <= LONGEST_KEY:
                raise InvalidRequest(f"its key has more than {LONGEST_KEY} characters")
            request = self._recipe.request_of(row.columns, image)
        except InvalidRequest as error:
            wrong = str(error)
            return RowEntry(number, position, row.key, None, wrong, shard, None, fields), None
        mark = self._mark(row, request)
        work = json.dumps({"request": request, "options": self._options})
        return RowEntry(number, position, row.key, work, None, shard, mark, fields), place

    def _image(self, number: int, row: Row) -> tuple[dict[str, Any], str | None]:
        """The reference to a row's picture, and where it is to be uploaded to, if it is."""
        if row.image is not None:
            return row.image.model_dump(exclude_none=True), None
        if row.data is None:
            return {}, None
        place = self.uploads.place_of(number, row.data, row.suffix)
        return {"uri": place}, place

    def _mark(self, row: Row, request: Mapping[str, Any]) -> str:
        """The same for rows with the same request, of the same bytes and model.

        Where the bytes do not pass through here, the reference stands for them.
        """
        picture = request["image"] if row.data is None else hashlib.sha256(row.data).hexdigest()
        rest = {name: value for name, value in request.items() if name != "image"}
        return _digest([picture, rest, self._options.get("model")])


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]
