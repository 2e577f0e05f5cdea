"""Who is in which slot: sequences are admitted, take steps together, and leave at any time."""

import functools
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch

from blipq_worker.blip2.decoding.sampling import ScoresError
from blipq_worker.blip2.decoding.sequences import Row
from blipq_worker.blip2.decoding.static.admission import Admission
from blipq_worker.blip2.decoding.static.groups import MOST_BEAMS, texts_of
from blipq_worker.blip2.decoding.static.sampler import Variant
from blipq_worker.blip2.decoding.static.state import LONGEST_NGRAM, Place
from blipq_worker.blip2.decoding.static.step import Shape, StaticStep, on_device

P = ParamSpec("P")
T = TypeVar("T")

#: The first window of attention; each further one is twice as wide.
_WINDOW = 64


@dataclass(slots=True, eq=False)
class _Seat:
    """A sequence in a slot, or its beams in as many.

    steps: how many more may be launched. position: where the next one writes. failed: its scores
    were not numbers. over: its search has ended; fetched: what was found is on its way. A slot has
    another seat for each sequence: what a step chose for one never reaches the next.
    """

    row: Row
    place: Place
    variant: Variant
    steps: int
    position: int
    failed: bool = False
    over: bool = False
    fetched: bool = False

    @property
    def slot(self) -> int:
        """The slot in which a step writes the result."""
        return self.place.slots[0]

    @property
    def bucket(self) -> int:
        """Slots that a step must cover: of so many it covers half as many groups."""
        return max(*self.place.slots, 2 * self.place.group - 1) + 1


def _on_its_device(
    method: "Callable[Concatenate[StaticLoop, P], T]",
) -> "Callable[Concatenate[StaticLoop, P], T]":
    """Streams, events and Triton's launches go to the current device, which may be another."""

    @functools.wraps(method)
    def run(self: "StaticLoop", *args: P.args, **kwargs: P.kwargs) -> T:
        with on_device(self.device), torch.inference_mode():
            return method(self, *args, **kwargs)

    return run  # type: ignore[return-value]  # the type of wraps is too wide


class StaticLoop:
    """Runs sequences of a language model in static slots; see ``DecodeLoop``. Of one thread.

    The host reads tokens one step late, so that the device never waits for it: sequences that
    ``join`` and ``step`` return may have their tokens only after the next step. Of a search it
    reads whether it has ended, and then what it has found, with the step after. run, admit: take
    steps and admit sequences; by default eagerly. Sequences stay in their slots, the lowest that
    were free.
    """

    def __init__(
        self,
        step: StaticStep,
        run: Callable[[Shape], None] | None = None,
        admit: Callable[[Sequence[Row], Sequence[Place], Variant], torch.Tensor] | None = None,
    ) -> None:
        self._step = step
        self._run = step if run is None else run
        eager = Admission(step)
        self._sent = eager.sent
        self._admit = eager if admit is None else admit
        self.device = step.state.tokens.device
        self._columns = step.language.columns
        self._free = set(range(self.slots))
        #: Groups that nobody has: each takes two slots at least, so there are always enough.
        self._free_groups = set(range(1, self.slots // 2 + 1))
        self._seats: dict[Row, _Seat] = {}
        self._unread: deque[_Reading] = deque()
        self._ends = frozenset(step.sampler.ends.tolist())
        #: How steps are taken, in a few words.
        self.way = "eagerly"

    def __contains__(self, row: Row) -> bool:
        return row in self._seats

    @property
    def running(self) -> list[Row]:
        """The sequences in slots, in the order in which they joined."""
        return list(self._seats)

    @property
    def slots(self) -> int:
        return len(self._step.state.tokens)

    @property
    def free(self) -> int:
        """Slots without a sequence."""
        return len(self._free)

    @property
    def room(self) -> int:
        """The same: each has its memory."""
        return self.free

    @property
    def bytes(self) -> int:
        """What the slots take: the same at all times."""
        return self._step.language.bytes + self._step.bytes

    def suits(self, row: Row) -> bool:
        """Whether a slot is long enough for it, and there are enough for its beams."""
        if row.params.no_repeat_ngram_size > LONGEST_NGRAM:
            return False
        if row.params.num_beams > min(MOST_BEAMS, self.slots):
            return False
        return self._step.language.suits(row)

    def size(self, row: Row) -> int:
        """Slots that a row that ``suits`` takes: one for each of its beams."""
        return row.params.num_beams

    def fits(self, row: Row, beside: Sequence[Row] = ()) -> bool:
        """Whether there are slots for a row that ``suits``, after those that join with it."""
        needed = sum(self.size(each) for each in (*beside, row))
        return self.suits(row) and needed <= self.free

    def queue(self, row: Row) -> str:
        """All wait for the next slot."""
        return "static"

    @_on_its_device
    def join(self, rows: Sequence[Row]) -> list[Row]:
        """Takes rows in. They must fit. Returns them.

        What it raises leaves all as it was.
        """
        if not rows:
            return []
        places = self._places(rows)
        parts = [[row for row in rows if row.has_beams == beams] for beams in (False, True)]
        admitted: list[tuple[list[Row], _Reading, torch.Tensor]] = []
        try:
            for part in filter(None, parts):
                reading = _Reading(self.device, len(part), 2)
                at = [places[row] for row in part]
                admitted.append((part, reading, self._admit(part, at, self._variant(part))))
        except BaseException:
            # The first part, or some of the second one, is in slots that nobody has: it must not
            # go on there, nor pass for the beams of a group that others have by then.
            slots = [slot for place in places.values() for slot in place.slots]
            self._step.release(self._sent(slots))
            raise
        for part, reading, chosen in admitted:
            seats = [self._seat(row, places[row]) for row in part]
            self._unread.append(reading)
            reading.begin(chosen, self._write, seats, range(len(seats)))
        return list(rows)

    def _places(self, rows: Sequence[Row]) -> dict[Row, Place]:
        """The lowest free places, in the order of the rows."""
        slots, groups = iter(sorted(self._free)), iter(sorted(self._free_groups))
        return {
            row: Place(
                tuple(itertools.islice(slots, self.size(row))),
                next(groups) if row.has_beams else 0,
            )
            for row in rows
        }

    @_on_its_device
    def step(self, rows: Sequence[Row]) -> list[Row]:
        """Takes a step of these running rows, and reads the tokens of what was launched before.

        Returns them. Raises ScoresError, and then has taken no step, if the scores of one of them
        were not finite numbers.
        """
        seats = [self._seats[row] for row in rows]
        if any(seat.failed for seat in seats):
            raise ScoresError("the model's scores are not numbers")
        self._fetch()
        launched = self._launch([seat for seat in seats if seat.steps > 0 and not seat.over])
        self._read(launched)
        return list(rows)

    @_on_its_device
    def leave(self, rows: Iterable[Row]) -> None:
        """Frees the slots of rows; what is under way for them is not written."""
        seats = [self._seats[row] for row in rows if row in self._seats]
        if not seats:
            return
        slots = [slot for seat in seats for slot in seat.place.slots]
        self._step.release(self._sent(slots))
        self._free.update(slots)
        for seat in seats:
            del self._seats[seat.row]
            if seat.place.group:
                self._free_groups.add(seat.place.group)
        if not self._seats:
            self._unread.clear()

    def _variant(self, rows: Iterable[Row]) -> Variant:
        return Variant.of((row.params for row in rows), self._step.sampler.vocabulary)

    def _seat(self, row: Row, place: Place) -> _Seat:
        position = self._step.language.first_position(row)
        seat = _Seat(row, place, self._variant([row]), row.params.max_new_tokens - 1, position)
        self._seats[row] = seat
        self._free.difference_update(place.slots)
        self._free_groups.discard(place.group)
        row.joined = True
        return seat

    def _launch(self, seats: Sequence[_Seat]) -> "_Reading | None":
        """Launches a step of these, while the other running ones are held."""
        if not seats:
            return None
        bucket = self._bucket(max(seat.bucket for seat in seats))
        window = self._window(max(seat.position for seat in seats) + 1)
        shape = Shape(bucket, window, Variant.all_of(seat.variant for seat in seats))
        reading = _Reading(self.device, bucket, 2)
        going = set(seats)
        held = [
            slot
            for seat in self._seats.values()
            if seat.steps > 0 and seat not in going
            for slot in seat.place.slots
            if slot < bucket
        ]
        if held:
            self._run_without(held, shape)
        else:
            self._run(shape)
        for seat in seats:
            seat.steps -= 1
            seat.position += 1
        at = [seat.slot for seat in seats]
        reading.begin(self._step.chosen[:bucket], self._write, seats, at)
        return reading

    def _fetch(self) -> None:
        """Has copied to the host what searches have found that it knows to have ended."""
        seats = [seat for seat in self._seats.values() if seat.over and not seat.fetched]
        if not seats:
            return
        number = max(seat.row.params.num_return_sequences for seat in seats)
        groups = self._sent([seat.place.group for seat in seats])
        results = self._step.groups.results(groups, number)
        reading = _Reading(self.device, *results.shape)
        for seat in seats:
            seat.fetched = True
        self._unread.append(reading)
        reading.begin(results, self._settle, seats, range(len(seats)))

    def _run_without(self, slots: Sequence[int], shape: Shape) -> None:
        """A step in which some slots stay as they are."""
        at, live = self._sent(slots), self._step.state.live
        kept = live.index_select(0, at)
        live.index_fill_(0, at, False)
        try:
            self._run(shape)
        finally:
            live.index_copy_(0, at, kept)

    def _bucket(self, slots: int) -> int:
        """The next power of two, or all slots."""
        return min(1 << (slots - 1).bit_length(), len(self._step.state.tokens))

    def _window(self, columns: int) -> int:
        if not self._step.attention.windows:
            return self._columns
        return min(max(_WINDOW, 1 << (columns - 1).bit_length()), self._columns)

    def _read(self, last: "_Reading | None") -> None:
        """Writes the tokens of all that was launched, but for the step launched last."""
        while self._unread:
            self._unread.popleft().finish()
        if last is not None:
            self._unread.append(last)

    def _write(self, seat: _Seat, chosen: Sequence[float]) -> None:
        # Who has left, ended or failed meanwhile took an idle step.
        if self._seats.get(seat.row) is not seat or seat.row.ended or seat.failed or seat.over:
            return
        token, log = int(chosen[0]), chosen[1]
        if token < 0:
            seat.failed = True
        elif seat.row.has_beams:
            seat.over = token == 0
        else:
            seat.row.write(token, log, self._ends)

    def _settle(self, seat: _Seat, result: Sequence[Sequence[float]]) -> None:
        """Ends a search with what it has found, unless it has left."""
        if self._seats.get(seat.row) is seat:
            number = seat.row.params.num_return_sequences
            found = texts_of(result[:number], len(self._step.sampler.start))
            seat.row.settle(*found, self._ends)


class _Reading:
    """What a step has come to, on its way to the host: whole numbers and logarithms, as float64.

    It has its memory before the step is launched: a step that was taken cannot be taken again.
    """

    def __init__(self, device: torch.device, *shape: int) -> None:
        on_gpu = device.type == "cuda"
        self._host = torch.empty(shape, dtype=torch.float64, pin_memory=on_gpu)
        self._event: torch.cuda.Event | None = None
        if on_gpu:
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]

    def begin(
        self,
        numbers: torch.Tensor,
        write: Callable[[_Seat, Any], None],
        seats: Sequence[_Seat],
        places: Sequence[int],
    ) -> None:
        """Has the numbers copied. write: what is to be done then with those of each seat.

        places: where these are.
        """
        self._write, self._seats, self._places = write, seats, places
        self._host.copy_(numbers, non_blocking=True)
        if self._event is not None:
            self._event.record()

    def finish(self) -> None:
        """Waits for the numbers, and writes them."""
        if self._event is not None:
            self._event.synchronize()
        numbers = self._host.tolist()
        for seat, place in zip(self._seats, self._places, strict=True):
            self._write(seat, numbers[place])
