"""Who is in which slot: sequences are admitted, take steps together, and leave at any time."""

import functools
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Concatenate, ParamSpec, TypeVar

import torch

from blipq_worker.blip2.decoding.sampling import ScoresError
from blipq_worker.blip2.decoding.sequences import Row
from blipq_worker.blip2.decoding.static.admission import Admission
from blipq_worker.blip2.decoding.static.sampler import Variant
from blipq_worker.blip2.decoding.static.state import LONGEST_NGRAM
from blipq_worker.blip2.decoding.static.step import Shape, StaticStep, on_device

P = ParamSpec("P")
T = TypeVar("T")

#: The first window of attention; each further one is twice as wide.
_WINDOW = 64


@dataclass(slots=True, eq=False)
class _Seat:
    """A sequence in a slot.

    steps: how many more may be launched. position: where the next one writes. failed: its scores
    were not numbers. A slot has another seat for each sequence: what a step chose for one never
    reaches the next.
    """

    row: Row
    slot: int
    variant: Variant
    steps: int
    position: int
    failed: bool = False


def _on_its_device(
    method: "Callable[Concatenate[StaticLoop, P], T]",
) -> "Callable[Concatenate[StaticLoop, P], T]":
    """Streams, events and Triton's launches go to the current device, which may be another."""

    @functools.wraps(method)
    def run(self: "StaticLoop", *args: P.args, **kwargs: P.kwargs) -> T:
        with on_device(self.device), torch.inference_mode():
            return method(self, *args, **kwargs)

    return run  # type: ignore[return-value]  # wraps says too little


class StaticLoop:
    """Runs sequences of a language model in static slots; see ``DecodeLoop``. Of one thread.

    The host reads tokens one step late, so that the device never waits for it: sequences that
    ``join`` and ``step`` return may have their tokens only after the next step. run, admit: take
    steps and admit sequences; by default eagerly. Sequences stay in their slots, the lowest that
    were free.
    """

    def __init__(
        self,
        step: StaticStep,
        run: Callable[[Shape], None] | None = None,
        admit: Callable[[Sequence[Row], Sequence[int], Variant], torch.Tensor] | None = None,
    ) -> None:
        self._step = step
        self._run = step if run is None else run
        eager = Admission(step)
        self._sent = eager.sent
        self._admit = eager if admit is None else admit
        self.device = step.state.tokens.device
        self._columns = step.language.columns
        self._free = set(range(len(step.state.tokens)))
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
    def bytes(self) -> int:
        """What the slots take: the same at all times."""
        return self._step.language.bytes + self._step.state.bytes

    def suits(self, row: Row) -> bool:
        """Whether a slot is long enough for it."""
        if row.has_beams or row.params.no_repeat_ngram_size > LONGEST_NGRAM:
            return False
        return self._step.language.suits(row)

    def fits(self, row: Row, beside: Sequence[Row] = ()) -> bool:
        """Whether there is a slot for a row that ``suits``, after those that join with it."""
        return self.suits(row) and len(beside) < self.free

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
        slots = sorted(self._free)[: len(rows)]
        reading = _Reading(len(rows), self.device)
        chosen = self._admit(rows, slots, self._variant(rows))
        seats = [self._seat(row, slot) for row, slot in zip(rows, slots, strict=True)]
        self._unread.append(reading)
        reading.begin(chosen, seats, range(len(seats)))
        return list(rows)

    @_on_its_device
    def step(self, rows: Sequence[Row]) -> list[Row]:
        """Takes a step of these running rows, and reads the tokens of what was launched before.

        Returns them. Raises ScoresError, and then has taken no step, if the scores of one of them
        were not finite numbers.
        """
        seats = [self._seats[row] for row in rows]
        if any(seat.failed for seat in seats):
            raise ScoresError("the model's scores are not numbers")
        launched = self._launch([seat for seat in seats if seat.steps > 0])
        self._read(launched)
        return list(rows)

    @_on_its_device
    def leave(self, rows: Iterable[Row]) -> None:
        """Frees the slots of rows; what is under way for them is not written."""
        seats = [self._seats[row] for row in rows if row in self._seats]
        if not seats:
            return
        self._step.state.release(self._sent([seat.slot for seat in seats]))
        for seat in seats:
            del self._seats[seat.row]
            self._free.add(seat.slot)
        if not self._seats:
            self._unread.clear()

    def _variant(self, rows: Iterable[Row]) -> Variant:
        return Variant.of((row.params for row in rows), self._step.sampler.vocabulary)

    def _seat(self, row: Row, slot: int) -> _Seat:
        position = self._step.language.first_position(row)
        seat = _Seat(row, slot, self._variant([row]), row.params.max_new_tokens - 1, position)
        self._seats[row] = seat
        self._free.discard(slot)
        row.joined = True
        return seat

    def _launch(self, seats: Sequence[_Seat]) -> "_Reading | None":
        """Launches a step of these, while the other running ones are held."""
        if not seats:
            return None
        bucket = self._bucket(max(seat.slot for seat in seats) + 1)
        window = self._window(max(seat.position for seat in seats) + 1)
        shape = Shape(bucket, window, Variant.all_of(seat.variant for seat in seats))
        reading = _Reading(bucket, self.device)
        going = set(seats)
        held = [
            seat.slot
            for seat in self._seats.values()
            if seat.slot < bucket and seat.steps > 0 and seat not in going
        ]
        if held:
            self._run_without(held, shape)
        else:
            self._run(shape)
        for seat in seats:
            seat.steps -= 1
            seat.position += 1
        reading.begin(self._step.chosen[:bucket], seats, [seat.slot for seat in seats])
        return reading

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
            for seat, token in self._unread.popleft().tokens():
                self._write(seat, token)
        if last is not None:
            self._unread.append(last)

    def _write(self, seat: _Seat, token: int) -> None:
        # Who has left, ended or failed meanwhile took an idle step.
        if self._seats.get(seat.row) is not seat or seat.row.ended or seat.failed:
            return
        if token < 0:
            seat.failed = True
        else:
            seat.row.write(token, self._ends)


class _Reading:
    """The tokens of a step on their way to the host.

    It has its memory before the step is launched: a step that was taken cannot be taken again.
    """

    def __init__(self, count: int, device: torch.device) -> None:
        on_gpu = device.type == "cuda"
        self._host = torch.empty(count, dtype=torch.long, pin_memory=on_gpu)
        self._event: torch.cuda.Event | None = None
        if on_gpu:
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]

    def begin(self, chosen: torch.Tensor, seats: Sequence[_Seat], places: Sequence[int]) -> None:
        """Has the tokens, (count,), copied. places: where those of the seats are."""
        self._seats, self._places = seats, places
        self._host.copy_(chosen, non_blocking=True)
        if self._event is not None:
            self._event.record()

    def tokens(self) -> list[tuple[_Seat, int]]:
        """Waits for them; -1 is one that could not be chosen."""
        if self._event is not None:
            self._event.synchronize()
        chosen = self._host.tolist()
        pairs = zip(self._seats, self._places, strict=True)
        return [(seat, chosen[place]) for seat, place in pairs]
