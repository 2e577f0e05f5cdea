"""Sequences come into their slots: prompts are read, and first tokens chosen. Eagerly or by graphs.

Of everything that comes from the host there is one copy: a table of whole numbers. Read beside a
worker's other threads, a prefill of hundreds of launches takes several times as long as alone.
"""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from blipq_worker.blip2.cuda.capture import CaptureError, Run, first_line
from blipq_worker.blip2.decoding.kv_cache import round_up
from blipq_worker.blip2.decoding.sequences import Row
from blipq_worker.blip2.decoding.static.groups import SlotGroups
from blipq_worker.blip2.decoding.static.sampler import Variant
from blipq_worker.blip2.decoding.static.state import (
    ADAPTER,
    PARAMS,
    Place,
    SlotState,
    packed_params,
)
from blipq_worker.blip2.decoding.static.step import StaticStep

log = logging.getLogger(__name__)

#: Prompts are padded to a multiple: fewer shapes for libraries to choose kernels for.
_PROMPT_STEP = 8
#: Sequences that a graph admits: more are admitted eagerly, fewer with copies of the last one.
BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64)
#: No token: what a graph that does nothing leaves.
_NOTHING = -2
#: Graphs beyond those captured at the start.
_RARE = 24


class Admission:
    """Puts new sequences into slots, without a CUDA graph."""

    def __init__(self, step: StaticStep) -> None:
        self.step = step

    def __call__(
        self, rows: Sequence[Row], places: Sequence[Place], variant: Variant
    ) -> torch.Tensor:
        """Puts rows into these places; their first tokens, (rows, 2), as ``Sampler.write`` does.

        All or none of them have beams. What it raises leaves running sequences as they were.
        """
        width = round_up(max(len(row.ids) for row in rows), _PROMPT_STEP)
        table = self.sent(self.table(rows, places, self.within(width, rows), variant))
        return self.run(table, torch.stack([row.queries for row in rows]), variant)

    def within(self, width: int, rows: Sequence[Row]) -> int:
        """The width, or what the slots leave for ids beside the queries."""
        return min(width, self.step.language.prompt_columns - len(rows[0].queries))

    def table(
        self, rows: Sequence[Row], places: Sequence[Place], width: int, variant: Variant
    ) -> list[list[int]]:
        """What ``run`` reads of each: group, length, slots, parameters, ids.

        Slots fill up with the last of them, as many as the variant has beams.
        """
        slots = max(1, variant.beams)
        return [
            [
                *(place.group, row.prompt_length),
                *place.slots,
                *[place.slots[-1]] * (slots - len(place.slots)),
                *packed_params(row),
                *row.ids,
                *[0] * (width - len(row.ids)),
            ]
            for row, place in zip(rows, places, strict=True)
        ]

    def sent(self, numbers: Sequence[object]) -> torch.Tensor:
        """Whole numbers on the device, in one copy that nobody waits for."""
        device = self.step.state.tokens.device
        pinned = device.type == "cuda"
        host = torch.tensor(numbers, dtype=torch.long, pin_memory=pinned)
        return host.to(device, non_blocking=True)

    def run(self, table: torch.Tensor, queries: torch.Tensor, variant: Variant) -> torch.Tensor:
        """The same of a table on the device and queries, (rows, 32, hidden). May be run again."""
        step, slots = self.step, max(1, variant.beams)
        widths = [1, 1, slots, PARAMS, table.shape[1] - 2 - slots - PARAMS]
        groups, lengths, at, params, ids = (
            part.contiguous() for part in torch.split(table, widths, dim=1)
        )
        lengths = lengths[:, 0]
        with step.language.rows.of(params[:, ADAPTER]):
            scores, filled, positions = step.language.prefill(queries, ids, lengths)
        fresh = step.state.fresh(params, positions, step.sampler.start)
        begun = step.sampler.begun(fresh) if variant.beams else None
        chosen = step.sampler.write(scores, fresh, variant, begun)
        step.language.put(at, filled, lengths, clear=step.attention.windows)
        if begun is None:
            step.groups.place_alone(at[:, 0])
            step.state.place(at[:, 0], fresh)
        else:
            self._place(groups[:, 0], at, fresh, begun)
        return chosen

    def _place(
        self, numbers: torch.Tensor, at: torch.Tensor, fresh: SlotState, begun: SlotGroups
    ) -> None:
        """Puts the beams of groups into their slots ``at``, (groups, most of them)."""
        step, beams = self.step, begun.beams
        ranks = torch.arange(at.shape[1], device=at.device)
        rank = torch.minimum(ranks, beams.beams[:, None] - 1)
        # Of one that failed nothing is written.
        last = (beams.count + len(step.sampler.start) - 1).clamp(min=0)[:, None, None]
        tokens = beams.texts.gather(2, last.expand(-1, beams.texts.shape[1], 1))[..., 0]
        step.groups.place(numbers, at, rank, begun)
        step.state.place_beams(at, fresh, tokens.gather(1, rank))


class _Shape(NamedTuple):
    """What is fixed in a graph. queries, ids: columns of a prompt."""

    rows: int
    queries: int
    ids: int
    variant: Variant


@dataclass(frozen=True, slots=True)
class _Recorded:
    """A graph, what it reads and what it writes."""

    table: torch.Tensor
    queries: torch.Tensor
    chosen: torch.Tensor
    replay: Run


class AdmissionGraphs:
    """Admits by graphs, which are captured when they are first needed, if there are not too many.

    capture: see ``Graphs``.
    """

    def __init__(
        self, admission: Admission, capture: Callable[[Run], Run], rare: int = _RARE
    ) -> None:
        self._admission, self._capture = admission, capture
        self._left = rare
        self._recorded: dict[_Shape, _Recorded | None] = {}

    def __len__(self) -> int:
        return sum(each is not None for each in self._recorded.values())

    def prepare(self, row: Row, most: int) -> None:
        """Captures admissions of up to ``most`` rows like this one; the state is in use."""
        self._left += len(BUCKETS)
        beams = row.params.num_beams
        place = Place(tuple(range(beams)), 1 if row.has_beams else 0)
        variant = Variant.of([row.params], self._admission.step.sampler.vocabulary)
        for bucket in reversed(BUCKETS):
            if bucket <= most:
                self([row] * bucket, [place] * bucket, variant)

    def __call__(
        self, rows: Sequence[Row], places: Sequence[Place], variant: Variant
    ) -> torch.Tensor:
        bucket = next((size for size in BUCKETS if size >= len(rows)), None)
        if bucket is None:
            return self._admission(rows, places, variant)
        # Copies of the last one write the same to the same places.
        missing = bucket - len(rows)
        padded, at = [*rows, *[rows[-1]] * missing], [*places, *[places[-1]] * missing]
        longest = max(_PROMPT_STEP, *(len(row.ids) for row in rows))
        width = self._admission.within(1 << (longest - 1).bit_length(), rows)
        shape = _Shape(bucket, len(rows[0].queries), width, variant)
        table = self._admission.sent(self._admission.table(padded, at, width, variant))
        queries = torch.stack([row.queries for row in padded])
        if shape not in self._recorded and self._left > 0:
            self._left -= 1
            self._recorded[shape] = self._attempt(shape, table, queries)
        recorded = self._recorded.get(shape)
        if recorded is None:
            return self._admission.run(table, queries, variant)[: len(rows)]
        recorded.table.copy_(table)
        recorded.queries.copy_(queries)
        try:
            recorded.replay()
        except RuntimeError as error:
            self._recorded[shape] = None
            log.warning("decoding: %s goes on without its graph: %s", shape, first_line(error))
            return self._admission.run(table, queries, variant)[: len(rows)]
        return recorded.chosen[: len(rows)]

    def _attempt(
        self, shape: _Shape, table: torch.Tensor, queries: torch.Tensor
    ) -> _Recorded | None:
        started = time.monotonic()
        try:
            recorded = self._checked(shape, table, queries)
        except torch.OutOfMemoryError:
            return None  # a smaller one may fit
        except Exception as error:
            self._left = 0
            log.warning("decoding: no graph for an admission of %s: %s", shape, first_line(error))
            return None
        log.debug("decoding: a graph for %s, %.1f s", shape, time.monotonic() - started)
        return recorded

    def _checked(self, shape: _Shape, table: torch.Tensor, queries: torch.Tensor) -> _Recorded:
        """The graph, after it has chosen what is chosen without it.

        That each run puts the same into the same slots is what makes it possible under way.
        """
        chosen = torch.empty((len(table), 2), dtype=torch.float64, device=table.device)

        def admit() -> None:
            chosen.copy_(self._admission.run(table, queries, shape.variant))

        replay = self._capture(admit)
        found = []
        for run in (admit, replay):
            chosen.fill_(_NOTHING)
            run()
            found.append(torch.cat([chosen[:, 0].long(), self._admission.step.state.tokens]))
        if not torch.equal(*found):
            raise CaptureError("its graph chooses other tokens")
        return _Recorded(table, queries, chosen, replay)
