"""Searches with beams in static slots: a slot for each beam, and tables of what they share.

A prompt is read once, into the slot of the first beam. ``ancestry`` holds for each column of a slot
the slot with the keys and values that its beam attends to there. When a beam goes on from another
one, it takes over the other's row of this table; keys and values are never moved.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from blipq_worker.blip2.decoding.beams import Beams, Stopping, choose_beams

#: Most beams of a search.
MOST_BEAMS = 16
#: Numbers of beams for which steps are made; searches with fewer leave the rest unused.
WIDTHS = (5, MOST_BEAMS)


class Found(NamedTuple):
    """The result of a step, for each slot; undefined for slots without a beam.

    tokens: (n,), the beams' new tokens. going: (n,), whether their searches go on. outcome: (n,),
    1 where they go on, 0 where they have ended, -1 where scores were no numbers. groups: the state
    after it.
    """

    tokens: torch.Tensor
    going: torch.Tensor
    outcome: torch.Tensor
    groups: "SlotGroups"


@dataclass(slots=True)
class SlotGroups:
    """The groups of beams in n slots. All zeros: there is none.

    number, rank: (n,), the group of each slot, from 1, or 0, and which of its beams is there.
    ancestry: (n, columns), int32, slots. members: (groups, most beams), the slots of each group;
    behind its last beam any. beams: what is written of each group.
    """

    number: torch.Tensor
    rank: torch.Tensor
    ancestry: torch.Tensor
    members: torch.Tensor
    beams: Beams

    @classmethod
    def empty(cls, slots: int, columns: int, device: torch.device) -> "SlotGroups":
        """As many groups as could be in so many slots, each with two beams at least."""
        groups = slots // 2
        nothing = torch.zeros(groups, dtype=torch.long, device=device)
        return cls(
            number=torch.zeros(slots, dtype=torch.long, device=device),
            rank=torch.zeros(slots, dtype=torch.long, device=device),
            ancestry=torch.zeros((slots, columns), dtype=torch.int32, device=device),
            members=torch.zeros((groups, MOST_BEAMS), dtype=torch.long, device=device),
            beams=Beams.begun(
                nothing, nothing.clone(), nothing.double(), most=MOST_BEAMS, longest=columns
            ),
        )

    @classmethod
    def begun(cls, beams: Beams) -> "SlotGroups":
        """Groups about to write their first tokens, each in a slot with all of its beams."""
        count, most, columns = beams.texts.shape
        slots = torch.arange(count, device=beams.count.device)
        return cls(
            number=slots + 1,
            rank=torch.zeros_like(slots),
            ancestry=beams.texts.new_zeros((count, columns), dtype=torch.int32),
            members=slots[:, None].expand(-1, most),
            beams=beams,
        )

    def first(self, slots: int, most: int) -> "SlotGroups":
        """The first slots and their groups, of which none that goes on has more beams: views."""
        groups = slots // 2
        return SlotGroups(
            self.number[:slots],
            self.rank[:slots],
            self.ancestry[:slots],
            self.members[:groups, :most],
            self.beams.first(groups, most),
        )

    def copy(self) -> "SlotGroups":
        """The same in memory of its own."""
        beams = Beams(*(tensor.clone() for tensor in self.beams.tensors()))
        number, rank, ancestry, members = (tensor.clone() for tensor in self._own())
        return SlotGroups(number, rank, ancestry, members, beams)

    def restore(self, copied: "SlotGroups") -> None:
        """Takes over what was copied."""
        for mine, theirs in zip(self.tensors(), copied.tensors(), strict=True):
            mine.copy_(theirs)

    def clear(self) -> None:
        """Lets no slot be part of a group."""
        self.number.zero_()

    def _own(self) -> list[torch.Tensor]:
        return [self.number, self.rank, self.ancestry, self.members]

    def tensors(self) -> list[torch.Tensor]:
        """All of these, in one order."""
        return [*self._own(), *self.beams.tensors()]

    @property
    def bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors())

    @property
    def among(self) -> torch.Tensor:
        """Which slots have a beam, (n,)."""
        return self.number > 0

    @property
    def texts(self) -> torch.Tensor:
        """What the beams have written, (n, columns); anything where there is none."""
        group, rank = self._places()
        return self.beams.texts[group, rank]

    def _places(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Group and rank of each slot as indices; those of who is held may be beyond these."""
        groups, most = self.members.shape
        return (self.number - 1).clamp(0, groups - 1), self.rank.clamp(max=most - 1)

    def search(
        self,
        logs: torch.Tensor,
        noise: torch.Tensor | None,
        own: torch.Tensor,
        healthy: torch.Tensor,
        live: torch.Tensor,
        positions: torch.Tensor,
        *,
        ends: torch.Tensor,
        skipped: int,
        stopping: Stopping,
    ) -> Found:
        """One more token for the beams of all groups that are live. Changes nothing.

        logs, noise, own, ends, skipped, stopping: see ``choose_beams``, with slots for rows.
        healthy, live, positions: of the slots, (n,).
        """
        groups, most = self.members.shape
        # Who is held may have slots beyond these, or have none of its own any more.
        lanes = self.members.clamp(max=len(self.number) - 1)
        numbers = torch.arange(1, groups + 1, device=lanes.device)
        runs = (self.number[lanes[:, 0]] == numbers) & live[lanes[:, 0]]
        is_beam = torch.arange(most, device=lanes.device) < self.beams.beams[:, None]
        sound = (healthy[lanes] | ~is_beam).all(1)
        chosen = choose_beams(
            logs,
            lanes,
            self.beams,
            ends=ends,
            skipped=skipped,
            stopping=stopping,
            noise=noise,
            own=own,
        )
        going = chosen.going & sound & runs
        group, rank = self._places()
        parent = lanes[group, chosen.parents[group, rank]]
        going_on = going[group] & live
        after = SlotGroups(
            self.number,
            self.rank,
            self._inherited(parent, positions, going_on & self.among),
            self.members,
            chosen.beams.where(runs & sound, self.beams),
        )
        outcome = torch.where(sound, going.long(), -1)
        return Found(chosen.tokens[group, rank], going_on, outcome[group], after)

    def _inherited(
        self, parent: torch.Tensor, positions: torch.Tensor, moves: torch.Tensor
    ) -> torch.Tensor:
        """The table after beams have gone on from those in the slots ``parent``, (n,).

        At ``positions`` the parents have put the keys and values of their last tokens.
        """
        source = parent.to(torch.int32)[:, None]
        inherited = self.ancestry.index_select(0, parent).scatter(1, positions[:, None], source)
        return torch.where(moves[:, None], inherited, self.ancestry)

    def take(self, after: "SlotGroups") -> None:
        """Takes over what a search has come to. Takes no memory."""
        for mine, theirs in zip(self.tensors(), after.tensors(), strict=True):
            if mine is not theirs:
                mine.copy_(theirs)

    def place(
        self, numbers: torch.Tensor, members: torch.Tensor, rank: torch.Tensor, begun: "SlotGroups"
    ) -> None:
        """Puts groups that have written their first tokens into slots.

        numbers: (m,), from 1. members, rank: (m, most of them), slots and beams; behind the last
        one the last one again.
        """
        places, most = numbers - 1, members.shape[1]
        slots, columns = members.flatten(), self.ancestry.shape[1]
        ranks = torch.arange(MOST_BEAMS, device=places.device).clamp(max=most - 1)
        everyone = members.index_select(1, ranks)
        whose = numbers[:, None].expand_as(members).flatten()
        first = members[:, :1].to(torch.int32).expand(-1, most).flatten()
        rows, rank = first[:, None].expand(-1, columns), rank.flatten()
        # From here on nothing takes memory: a group is there as a whole, or not at all.
        for mine, theirs in zip(self.beams.tensors(), begun.beams.tensors(), strict=True):
            mine.index_copy_(0, places, theirs)
        self.members.index_copy_(0, places, everyone)
        self.ancestry.index_copy_(0, slots, rows)
        self.rank.index_copy_(0, slots, rank)
        self.number.index_copy_(0, slots, whose)

    def place_alone(self, at: torch.Tensor) -> None:
        """Gives the slots ``at`` to sequences without beams: each reads its own slot."""
        own = at.to(torch.int32)[:, None].expand(-1, self.ancestry.shape[1])
        self.ancestry.index_copy_(0, at, own)
        self.number.index_fill_(0, at, 0)

    def release(self, at: torch.Tensor) -> None:
        """Takes the slots ``at`` from their groups."""
        self.number.index_fill_(0, at, 0)

    def results(self, numbers: torch.Tensor, most: int) -> torch.Tensor:
        """The best texts of groups, (m, most, 2 x columns + 2), float64.

        Of each the tokens, their logarithms, their number, and the score.
        """
        beams = self.beams.take(numbers - 1)
        parts = beams.found, beams.found_logs, beams.lengths[..., None], beams.best[..., None]
        return torch.cat([part[:, :most].double() for part in parts], dim=-1)


class Results(NamedTuple):
    """The texts of a group, their scores, and the logarithms of their tokens."""

    texts: list[list[int]]
    scores: list[float]
    logs: list[list[float]]


def texts_of(result: Sequence[Sequence[float]], skipped: int) -> Results:
    """What ``results`` has found of a group, without the first ``skipped`` tokens of each text."""
    found = Results([], [], [])
    for row in result:
        columns, length = (len(row) - 2) // 2, int(row[-2])
        tokens = row[skipped : skipped + length]
        found.texts.append([int(token) for token in tokens])
        found.scores.append(row[-1])
        found.logs.append(list(row[columns + skipped : columns + skipped + length]))
    return found
