"""The jobs of the demo, their answers, and whether those are right."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import median, quantiles
from typing import Any, Literal, TypeAlias

from blipq.client.job import Job
from blipq.client.sync_client import Client
from blipq.contract import (
    CaptionResult,
    ImageRef,
    JobInfo,
    Kind,
    MatchResult,
    Receipt,
    TextScore,
    VQAResult,
)
from blipq_worker.demo.world import Demonstration

#: The share of right answers that a demo must reach.
PASS_SHARE = 0.95
MATCHES, NO_MATCH = "match", "no match"

Mark = Literal["right", "wrong", "failed"]


@dataclass(frozen=True)
class Case:
    """One job about the picture with this number, and the only right answer.

    ``topic`` is the kind, for questions what they ask for, such as a colour.
    """

    picture: int
    kind: Kind
    topic: str
    text: str
    expected: str

    def submit(self, client: Client, image: ImageRef) -> "Job[Answer]":
        match self.kind:
            case Kind.VQA:
                return client.vqa(image, self.text)
            case Kind.MATCH:
                return client.match(image, self.text)
        return client.caption(image)


Answer: TypeAlias = CaptionResult | VQAResult | MatchResult


def cases_of(picture: int, shown: Demonstration) -> Iterator[Case]:
    """The jobs of one picture: a caption, three questions, a true text and a false one."""
    yield Case(picture, Kind.CAPTION, "caption", "", shown.caption)
    for question in shown.questions:
        yield Case(picture, Kind.VQA, question.kind, question.question, question.answer)
    yield Case(picture, Kind.MATCH, "match", shown.matching_text, MATCHES)
    yield Case(picture, Kind.MATCH, "match", shown.non_matching_text, NO_MATCH)


@dataclass(frozen=True)
class Answered:
    """A job that has ended."""

    case: Case
    info: JobInfo

    @property
    def given(self) -> str:
        """The answer in words; for a failed job why it failed."""
        match self.info.result:
            case MatchResult(scores=(scored,)):
                return MATCHES if scored.score > 0.5 else NO_MATCH
            case CaptionResult() | VQAResult() as result:
                return result.text
        return str(self.info.error.code if self.info.error else self.info.status)

    @property
    def score(self) -> float | None:
        """The probability that the text matches, of a match job."""
        result = self.info.result
        return result.scores[0].score if isinstance(result, MatchResult) else None

    @property
    def confidence(self) -> float | None:
        """The mean probability of the tokens of a text that was written."""
        match self.info.result:
            case CaptionResult(captions=(written, *_)) | VQAResult(answers=(written, *_)):
                return written.mean_token_probability
        return None

    @property
    def mark(self) -> Mark:
        """Whether it is right, letter for letter."""
        if self.info.result is None:
            return "failed"
        return "right" if self.given == self.case.expected else "wrong"

    @property
    def took_ms(self) -> float:
        """From submit to result."""
        ended = self.info.completed_at or self.info.created_at
        return (ended - self.info.created_at).total_seconds() * 1000


@dataclass(frozen=True)
class Tally:
    """Answers counted. Times are of jobs that succeeded, from submit to result."""

    answers: Sequence[Answered]

    @property
    def jobs(self) -> int:
        return len(self.answers)

    @property
    def checked(self) -> int:
        """Jobs that gave an answer."""
        return self.right + self.wrong

    @cached_property
    def right(self) -> int:
        return self._count("right")

    @cached_property
    def wrong(self) -> int:
        return self._count("wrong")

    @cached_property
    def failed(self) -> int:
        """Jobs without an answer."""
        return self._count("failed")

    @property
    def share(self) -> float:
        """The part of the answers that is right; 0 where there are none."""
        return self.right / self.checked if self.checked else 0.0

    @property
    def passed(self) -> bool:
        """Whether enough is right and nothing failed."""
        return self.failed == 0 and self.checked > 0 and self.share >= PASS_SHARE

    @cached_property
    def p50_ms(self) -> float | None:
        """Half of the jobs took no longer."""
        return percentile(self._times(), 50)

    @cached_property
    def p95_ms(self) -> float | None:
        """19 of 20 jobs took no longer."""
        return percentile(self._times(), 95)

    def by_kind(self) -> dict[str, "Tally"]:
        """A tally per kind of job, in the order submitted."""
        return {
            str(kind): self.only(kind=kind) for kind in dict.fromkeys(a.kind for a in self._cases)
        }

    def by_topic(self) -> dict[str, "Tally"]:
        """A tally of the questions per thing they ask for."""
        topics = {case.topic for case in self._cases if case.kind is Kind.VQA}
        return {topic: self.only(kind=Kind.VQA, topic=topic) for topic in sorted(topics)}

    def only(self, *, kind: Kind, topic: str | None = None) -> "Tally":
        """The tally of some of the answers."""
        return Tally(
            [
                answer
                for answer in self.answers
                if answer.case.kind is kind and topic in (None, answer.case.topic)
            ]
        )

    @property
    def _cases(self) -> Iterator[Case]:
        return (answer.case for answer in self.answers)

    def _count(self, mark: Mark) -> int:
        return sum(answer.mark == mark for answer in self.answers)

    def _times(self) -> list[float]:
        return [answer.took_ms for answer in self.answers if answer.mark != "failed"]


def percentile(values: Sequence[float], percent: int) -> float | None:
    """The percentile of the values, or None without any."""
    if len(values) < 2:
        return values[0] if values else None
    if percent == 50:
        return median(values)
    return quantiles(values, n=100, method="inclusive")[percent - 1]


@dataclass(frozen=True)
class Explained:
    """A text about the picture with this number, with where the model looked for it."""

    picture: int
    scored: TextScore


@dataclass(frozen=True)
class Run:
    """A demo that has ended: its pictures, and everything that came back.

    explained: beside the answers, which are counted.
    """

    seed: int
    shown: Sequence[Demonstration]
    answers: Sequence[Answered]
    machine: str
    command: str
    explained: Explained | None = None

    @cached_property
    def tally(self) -> Tally:
        return Tally(self.answers)

    @cached_property
    def receipt(self) -> Receipt:
        """A receipt with the model that ran, and its precision."""
        receipts = (answer.info.receipt for answer in self.answers)
        return next((receipt for receipt in receipts if receipt and receipt.dtype), Receipt())

    @cached_property
    def seconds(self) -> float:
        """From the first submit to the last result."""
        return max(self.ended_after(), default=0.0)

    @property
    def images_per_second(self) -> float:
        """Pictures done with, over the whole run."""
        return len(self.shown) / self.seconds if self.seconds else 0.0

    def ended_after(self) -> list[float]:
        """When each job ended, in seconds since the first submit."""
        first = min((answer.info.created_at for answer in self.answers), default=None)
        ends = (answer.info.completed_at for answer in self.answers)
        return sorted((end - first).total_seconds() for end in ends if end and first)

    def summary(self) -> dict[str, Any]:
        """What ``--json`` prints, but for the report."""
        tally = self.tally
        return {
            "jobs": tally.jobs,
            "succeeded": tally.checked,
            "failed": tally.failed,
            "correct": tally.right,
            "checked": tally.checked,
            "passed": tally.passed,
            "images": len(self.shown),
            "images_per_second": round(self.images_per_second, 2),
            "seconds": round(self.seconds, 2),
            "by_kind": {kind: _kind_summary(part) for kind, part in tally.by_kind().items()},
            "seed": self.seed,
            "model": self.receipt.checkpoint,
            "quantization": self.receipt.quantization,
            "dtype": self.receipt.dtype,
            "machine": self.machine,
        }


def _kind_summary(tally: Tally) -> dict[str, Any]:
    p50_ms = None if tally.p50_ms is None else round(tally.p50_ms, 1)
    return {"checked": tally.checked, "correct": tally.right, "p50_ms": p50_ms}
