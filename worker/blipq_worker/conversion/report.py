"""What a conversion did, and how that is written for people."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from blipq_worker.inference.requests import Family

_SHOWN = 12


@dataclass(frozen=True, slots=True)
class Conversion:
    """A checkpoint of LAVIS that was written as a folder.

    base: what gave the configuration and the tokenizer. from_file: how many weights the file gave.
    from_base: names of weights that the base gave, as transformers names them. left_out: LAVIS's
    names of weights that nothing served takes. unknown: names of weights that no model of this kind
    has. prompt: what LAVIS put before captions. resized: the base's position embeddings were.
    """

    file: str
    folder: str
    family: Family
    image_size: int
    base: str
    epoch: int | None
    beside: tuple[str, ...]
    from_file: int
    from_base: tuple[str, ...]
    left_out: tuple[str, ...]
    unknown: tuple[str, ...]
    prompt: str | None
    resized: bool

    def lines(self) -> Iterator[str]:
        """For people; names are summed up by the part that they belong to.

        Each is one line that can be printed, whatever names the file has.
        """
        for line in self._lines():
            yield " ".join(line.splitlines()).encode(errors="backslashreplace").decode()

    def _lines(self) -> Iterator[str]:
        kind = {"opt": "OPT", "t5": "T5", "retrieval": "retrieval"}[self.family]
        epoch = "" if self.epoch is None else f", epoch {self.epoch}"
        yield f"{self.file}: {kind}, {self.image_size} px{epoch}"
        if self.beside:
            yield f"  not weights: {', '.join(self.beside)}"
        yield f"  {self.from_file} weights of the file"
        yield f"  {len(self.from_base)} weights of {self.base}, which the file lacks"
        yield from _by_part(self.from_base)
        if self.resized:
            yield f"    its position embeddings were resized to {self.image_size} px"
        yield f"  {len(self.left_out)} weights left out, which nothing that is served takes"
        yield from _by_part(self.left_out)
        if self.unknown:
            yield f"  {len(self.unknown)} weights unknown: the folder answers without them"
            yield from (f"    {name}" for name in self.unknown[:_SHOWN])
            if len(self.unknown) > _SHOWN:
                yield f"    and {len(self.unknown) - _SHOWN} more (--json lists all)"
        if self.prompt:
            yield f"  trained on captions after {self.prompt!r}"
        yield f"written: {self.folder}"


def _by_part(names: Sequence[str]) -> Iterator[str]:
    counts = Counter(".".join(name.split(".")[:2]) for name in names)
    for part, count in counts.items():
        yield f"    {part}: {count}"
