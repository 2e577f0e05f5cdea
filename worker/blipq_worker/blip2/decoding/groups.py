"""Prompts with several beams in growing slots: a group shares a slot, and its beams take columns.

The prompt is in the first columns of the slot. Behind it each step writes a column for each beam:
the first ones that are in no beam's past. ``seen`` is the table of the columns in each beam's past:
when a beam goes on from another one, it takes over the other's row of this table, and nothing else
moves. As beams soon have most of their past in common, a step reads little more than for one text.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from blipq_worker.blip2.decoding.beams import (
    Beams,
    Chosen,
    Stopping,
    candidates_of,
    choose_beams,
    stacked,
)
from blipq_worker.blip2.decoding.sampling import (
    ScoresError,
    gumbel,
    is_penalized,
    penalized,
    warped,
)
from blipq_worker.blip2.decoding.sequences import Row
from blipq_worker.blip2.decoding.views import Where


@dataclass(slots=True, eq=False)
class Group:
    """A prompt and its beams. first: the column behind the prompt. written: new tokens so far."""

    row: Row
    first: int
    written: int = 0

    @property
    def beams(self) -> int:
        return self.row.params.num_beams

    @property
    def last(self) -> int:
        """The position of the last tokens."""
        return self.first + self.written - 1


@dataclass(frozen=True, slots=True)
class BeamStep:
    """What a step reads of some groups. Their beams are its rows, one group after the other.

    where: the groups' slots. tokens, slots, columns: (rows,), the last tokens, and where they go.
    positions: (rows,), where they are in their texts. lanes, row: see ``views.Together``. seen:
    (groups, most beams, columns), up to the last one. depths: (groups, columns), the positions of
    what is in them.
    """

    groups: list[Group]
    where: Where
    beams: Beams
    tokens: torch.Tensor
    slots: torch.Tensor
    columns: torch.Tensor
    positions: torch.Tensor
    lanes: torch.Tensor
    row: torch.Tensor | None
    seen: torch.Tensor
    depths: torch.Tensor

    def distances(self, columns: int) -> torch.Tensor:
        """How far the texts at so many columns are from the last tokens, (groups, columns)."""
        last = torch.tensor([group.last for group in self.groups], device=self.tokens.device)
        return _up_to(columns, self.depths) - last[:, None]


@dataclass(frozen=True, slots=True)
class Begun:
    """Groups with their first tokens, before they are among the running ones."""

    groups: list[Group]
    chosen: Chosen
    seen: torch.Tensor
    depths: torch.Tensor


class Groups:
    """The running groups, in the order of their slots. What raises leaves them as they were.

    start: what texts begin with, before new tokens.
    """

    def __init__(
        self, ends: Sequence[int], start: Sequence[int], stopping: Stopping, device: torch.device
    ) -> None:
        self._ends = torch.tensor(list(ends), dtype=torch.long, device=device)
        self._known_ends = frozenset(ends)
        self._start, self._stopping, self._device = tuple(start), stopping, device
        self.running: list[Group] = []
        self._beams: Beams | None = None
        self._tokens = self._seen = self._depths = torch.empty(0, device=device)

    @property
    def rows(self) -> list[Row]:
        return [group.row for group in self.running]

    def begin(self, rows: Sequence[Row], firsts: Sequence[int], scores: torch.Tensor) -> Begun:
        """The first tokens of prompts, from their scores, (prompts, vocabulary)."""
        groups = [Group(row, first) for row, first in zip(rows, firsts, strict=True)]
        beams = Beams.fresh(rows, self._start, self._device)
        count, most = beams.scores.shape
        lanes = torch.arange(count, device=self._device)[:, None].expand(-1, most)
        columns = torch.arange(max(firsts), device=self._device)
        seen = columns < self._whole(firsts)[:, None, None]
        depths = columns.expand(count, -1)
        chosen = self._choose(groups, beams, scores, lanes)
        return Begun(groups, chosen, seen & _are_beams(beams), depths)

    def admit(self, begun: Begun) -> None:
        """Puts groups behind the running ones."""
        beams, tokens = begun.chosen.beams, begun.chosen.tokens
        seen, depths = begun.seen, begun.depths
        if self.running:
            assert self._beams is not None
            beams = self._beams.beside(beams)
            tokens, seen = stacked(self._tokens, tokens), stacked(self._seen, seen)
            depths = stacked(self._depths, depths)
        self._beams, self._tokens, self._seen, self._depths = beams, tokens, seen, depths
        places = range(len(self.running), len(self.running) + len(begun.groups))
        self.running.extend(begun.groups)
        self._count(begun.groups, places, begun.chosen.going)

    def ready(self, at: Sequence[int]) -> BeamStep:
        """What a step of the groups in these slots reads."""
        assert self._beams is not None
        groups = [self.running[index] for index in at]
        everyone = len(at) == len(self.running)
        where: Where = slice(len(at)) if everyone else self._whole(at)
        count, most = len(groups), self._tokens.shape[1]
        rows = self._whole(
            [place * most + rank for place, each in enumerate(groups) for rank in range(each.beams)]
        )
        owners, ranks = rows // most, rows % most
        columns = self._free(where)[owners, ranks]
        positions = self._whole([each.last for each in groups])[owners]
        seen = torch.nn.functional.pad(self._seen[where], (0, most))
        seen[owners, ranks, columns] = True
        depths = torch.nn.functional.pad(self._depths[where], (0, most))
        depths[owners, columns] = positions
        end = int(seen.any(1).any(0).nonzero()[-1]) + 1
        lanes = torch.zeros(count * most, dtype=torch.long, device=self._device)
        lanes[rows] = torch.arange(len(rows), device=self._device)
        return BeamStep(
            groups=groups,
            where=where,
            beams=self._beams if everyone else self._beams.take(self._whole(at)),
            tokens=self._tokens[where][owners, ranks],
            slots=owners if everyone else self._whole(at)[owners],
            columns=columns,
            positions=positions,
            lanes=lanes.view(count, most),
            row=None if len(rows) == len(lanes) else rows,
            seen=seen[:, :, :end],
            depths=depths[:, :end],
        )

    def _free(self, where: Where) -> torch.Tensor:
        """The first columns of groups that no beam sees, (groups, most beams)."""
        most = self._tokens.shape[1]
        unseen = ~torch.nn.functional.pad(self._seen[where].any(1), (0, most))
        ordinals = torch.arange(1, most + 1, device=self._device).expand(len(unseen), -1)
        return torch.searchsorted(unseen.cumsum(1), ordinals.contiguous())

    def choose(self, step: BeamStep, scores: torch.Tensor) -> Chosen:
        """What the beams of a step say next, from the scores of its rows, (rows, vocabulary)."""
        return self._choose(step.groups, step.beams, scores, step.lanes)

    def write(self, step: BeamStep, chosen: Chosen) -> None:
        """Takes over what a step has come to."""
        assert self._beams is not None
        parents = chosen.parents[..., None].expand_as(step.seen)
        seen = step.seen.gather(1, parents) & _are_beams(chosen.beams)
        beams, tokens, depths = chosen.beams, chosen.tokens, step.depths
        if not isinstance(step.where, slice):
            width = max(seen.shape[2], self._seen.shape[2])
            put = step.where
            beams = self._beams.put(put, beams)
            tokens = self._tokens.index_copy(0, put, tokens)
            seen = _up_to(width, self._seen).index_copy(0, put, _up_to(width, seen))
            depths = _up_to(width, self._depths).index_copy(0, put, _up_to(width, depths))
        # All of them or none: memory may run out above.
        self._beams, self._tokens, self._seen, self._depths = beams, tokens, seen, depths
        places = range(len(step.groups)) if isinstance(step.where, slice) else step.where.tolist()
        self._count(step.groups, places, chosen.going)

    def keep(self, order: Sequence[int]) -> None:
        """Lets all groups go but these, which become the first ones in this order."""
        kept = None
        if order:
            assert self._beams is not None
            at = self._whole(order)
            kept = self._beams.take(at)
            tables = self._tokens[at], self._seen[at], self._depths[at]
            self._tokens, self._seen, self._depths = tables
        self._beams = kept
        self.running = [self.running[index] for index in order]

    def _count(self, groups: Sequence[Group], places: Sequence[int], going: torch.Tensor) -> None:
        assert self._beams is not None
        for group, place, goes_on in zip(groups, places, going.tolist(), strict=True):
            group.written += 1
            if not goes_on:
                number = group.row.params.num_return_sequences
                found = self._beams.best_texts(place, number, len(self._start))
                group.row.settle(*found, self._known_ends)

    def _choose(
        self, groups: Sequence[Group], beams: Beams, scores: torch.Tensor, lanes: torch.Tensor
    ) -> Chosen:
        """Penalties and the shortest length come after the softmax, which greedy search has not."""
        if not bool(scores.amax(dim=-1).isfinite().all()):
            raise ScoresError("the model's scores are not numbers")
        own = torch.log_softmax(scores.float(), dim=-1)
        logs = own.clone()
        for index, group in enumerate(groups):
            rows = _rows(group, lanes[index])
            if is_penalized(group.row):
                written = len(self._start) + group.written
                before = beams.texts[index, : len(rows), :written]
                logs[rows] = penalized(logs[rows], group.row, before)
            if group.written < group.row.params.min_new_tokens:
                logs[rows[:, None], self._ends] = -math.inf
        return choose_beams(
            logs,
            lanes,
            beams,
            ends=self._ends,
            skipped=len(self._start),
            stopping=self._stopping,
            noise=self._noise(groups, logs, lanes),
            own=own,
        )

    def _noise(
        self, groups: Sequence[Group], logs: torch.Tensor, lanes: torch.Tensor
    ) -> torch.Tensor | None:
        """The noise of those that draw, (rows, vocabulary); None if nobody does.

        Leaves in ``logs`` what they may draw, with the temperature. A draw depends on the row's
        seed, the step, the beam and the token, and so on no neighbour.
        """
        drawn = [index for index, group in enumerate(groups) if group.row.params.do_sample]
        if not drawn:
            return None
        noise = torch.zeros_like(logs, dtype=torch.float64)
        for index in drawn:
            group = groups[index]
            rows = _rows(group, lanes[index])
            values, ids = warped(logs[rows], group.row, candidates_of(1, self._ends))
            seed, step = self._whole([group.row.seed]), self._whole([group.written])
            ranks = torch.arange(len(rows), device=self._device)[:, None]
            logs[rows] = torch.full_like(logs[rows], -math.inf).scatter(1, ids, values)
            noise[rows] = noise[rows].scatter(1, ids, gumbel(ids, seed, step, ranks))
        return noise

    def _whole(self, numbers: Sequence[int]) -> torch.Tensor:
        return torch.tensor(numbers, dtype=torch.long, device=self._device)


def _up_to(columns: int, table: torch.Tensor) -> torch.Tensor:
    """A table with so many columns, or all that it has."""
    return torch.nn.functional.pad(table, (0, max(0, columns - table.shape[-1])))


def _rows(group: Group, lanes: torch.Tensor) -> torch.Tensor:
    """The rows of a group, by beam, of its lanes, (most beams,): one before its first token."""
    return lanes[: group.beams if group.written else 1]


def _are_beams(beams: Beams) -> torch.Tensor:
    """Which beams there are, (groups, most beams, 1): what is none must hold no columns."""
    ranks = torch.arange(beams.scores.shape[1], device=beams.scores.device)
    return (ranks < beams.beams[:, None])[..., None]
