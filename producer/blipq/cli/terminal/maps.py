"""Heat maps as text, for terminals of 80 columns."""

from collections.abc import Iterator

from rich.cells import set_cell_size

from blipq.contract import TextScore
from blipq.images.heat import Heat, heat_of

#: Characters of a map: one is about twice as high as it is wide.
_WIDTH, _HEIGHT = 16, 8
_BESIDE, _GAP = 4, "    "
_SHADES = "·░▒▓█"


def grids(scored: TextScore) -> Iterator[str]:
    """A text's maps and those of its words, four side by side; nothing without maps."""
    if scored.map is None:
        return
    names = ("the whole text", *(scored.words or ()))
    drawn = [[_title(name), *_grid(heat_of(scored.map, at))] for at, name in enumerate(names)]
    for start in range(0, len(drawn), _BESIDE):
        yield ""
        for lines in zip(*drawn[start : start + _BESIDE], strict=True):
            yield _GAP.join(lines).rstrip()


def _title(name: str) -> str:
    return set_cell_size(name, _WIDTH)


def _grid(heat: Heat) -> Iterator[str]:
    for row in range(_HEIGHT):
        yield "".join(_shade(heat, row, column) for column in range(_WIDTH))


def _shade(heat: Heat, row: int, column: int) -> str:
    """The mean of what lies under a character, in five steps."""
    across = _under(column, _WIDTH, heat.columns)
    down = _under(row, _HEIGHT, heat.rows)
    levels = [heat.levels[y * heat.columns + x] for y in down for x in across]
    return _SHADES[sum(levels) * len(_SHADES) // (256 * len(levels))]


def _under(place: int, places: int, count: int) -> range:
    """Which of ``count`` values the n-th of so many places covers: at least one."""
    start = place * count // places
    return range(start, max(start + 1, (place + 1) * count // places))
