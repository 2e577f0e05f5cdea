"""How much of a GPU's time jobs will take, predicted from what jobs like them took.

Jobs are counted by their *shape*: kind, prompts, rows of a prompt, new tokens and texts, each
number rounded up to a power of two, as in ``vqa.4.8.16.0``. Workers add what jobs of a shape took
to the ledger, with the image's features cached (hits) and without, so it survives all of them.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

from blipq.contract import (
    CaptionRequest,
    DescribeRequest,
    EmbedRequest,
    Generation,
    MatchRequest,
    Request,
    SearchRequest,
    VQARequest,
)

#: Of a job of a model that has never run one: enough to ask for a first worker.
FIRST_GUESS_S = 1.0

#: LAVIS's defaults: see ``Generation``.
_BEAMS, _CAPTION_TOKENS, _ANSWER_TOKENS = 5, 30, 10


def shape_of(request: Request) -> str:
    """What a job's cost depends on."""
    sizes = (0 if size <= 0 else 1 << (size - 1).bit_length() for size in _sizes(request))
    return ".".join([request.kind, *map(str, sizes)])


def _sizes(request: Request) -> tuple[int, int, int, int]:
    """Prompts, rows of each, new tokens of each row, and texts to score."""
    match request:
        case CaptionRequest():
            best_of = request.best_of or 0
            rows = best_of or _rows(request.generation)
            return 1, rows, _tokens(request.generation, _CAPTION_TOKENS), best_of
        case VQARequest(choices=None):
            tokens = _tokens(request.generation, _ANSWER_TOKENS)
            return len(request.questions), _rows(request.generation), tokens, 0
        case VQARequest():
            return len(request.questions), 0, 0, len(request.choices or ())
        case MatchRequest():
            return 0, 0, 0, len(request.texts)
        case DescribeRequest():
            prompts = request.caption + len(request.questions)
            longest = _CAPTION_TOKENS if request.caption else _ANSWER_TOKENS
            if not prompts:
                return 0, 0, 0, len(request.texts)
            tokens = _tokens(request.generation, longest)
            return prompts, _rows(request.generation), tokens, len(request.texts)
        case EmbedRequest():
            return 0, 0, 0, int(request.text is not None)
        case SearchRequest():
            return 0, 0, 0, request.rerank if request.text is not None else 0


def _rows(generation: Generation | None) -> int:
    given = generation or Generation()
    beams = given.num_beams or (1 if given.do_sample else _BEAMS)
    return max(beams, given.num_return_sequences or 1)


def _tokens(generation: Generation | None, default: int) -> int:
    return (generation and generation.max_new_tokens) or default


@dataclass(frozen=True, slots=True)
class Cost:
    """What jobs of a shape take: ``gpu_s`` of the GPU, ``run_s`` from their claim to their end."""

    gpu_s: float
    run_s: float

    @classmethod
    def of(cls, text: str) -> Self:
        """From what ``learn.lua`` keeps."""
        misses, miss_ms, hits, hit_ms, share, run_ms = map(float, text.split())
        missed = miss_ms if misses else hit_ms
        hit = hit_ms if hits else miss_ms
        return cls((share * hit + (1 - share) * missed) / 1000, run_ms / 1000)


class Costs:
    """What is known of a model. hash: see ``keys.cost``."""

    def __init__(self, hash: Mapping[str, str]) -> None:
        self._known = {shape: Cost.of(text) for shape, text in hash.items() if shape != "error"}
        off, took = map(float, hash.get("error", "0 0").split())
        #: How far off predictions were lately, as a share of what the jobs took; None: not known.
        self.error = off / took if took else None

    def of(self, shape: str) -> Cost | None:
        """Of a job: what its shape took, or else the nearest of its kind, or any job."""
        if not self._known:
            return None
        return self._known.get(shape) or self._nearest(shape) or self._mean

    def gpu_s(self, shape: str) -> float:
        """Predicted GPU-seconds of a job."""
        cost = self.of(shape)
        return FIRST_GUESS_S if cost is None else cost.gpu_s

    def sum_s(self, jobs: Mapping[str, int]) -> float:
        """Predicted GPU-seconds of so many jobs by shape."""
        return sum(count * self.gpu_s(shape) for shape, count in jobs.items())

    def _nearest(self, shape: str) -> Cost | None:
        kind, sizes = _parsed(shape)
        found = [
            (sum(abs(own - other) for own, other in zip(sizes, others, strict=True)), known)
            for known in self._known
            for other_kind, others in (_parsed(known),)
            if other_kind == kind and len(others) == len(sizes)
        ]
        return self._known[min(found)[1]] if found else None

    @cached_property
    def _mean(self) -> Cost:
        costs = self._known.values()
        return Cost(
            sum(cost.gpu_s for cost in costs) / len(costs),
            sum(cost.run_s for cost in costs) / len(costs),
        )


def _parsed(shape: str) -> tuple[str, list[int]]:
    """Its kind, and its sizes as how often 1 was doubled."""
    kind, *sizes = shape.split(".")
    return kind, [int(size).bit_length() for size in sizes]


@dataclass(frozen=True, slots=True)
class Work:
    """A model's open jobs in GPU-seconds. Those that run count in full."""

    waiting_s: float
    running_s: float

    @property
    def total_s(self) -> float:
        """Of all open jobs."""
        return self.waiting_s + self.running_s


def work_of(
    costs: Costs, open_: Mapping[str, str], working: Mapping[str, str], waiting: int
) -> Work:
    """What the open jobs of a model will take.

    open_, working: counts by shape (``keys.work``, ``keys.working``). waiting: how many wait in its
    queues. That number is exact; where workers of an earlier version leave counts behind, or jobs
    have none, the counts only say of which shapes the jobs are.
    """
    running = counted(working)
    return Work(waiting * mean_s(costs, open_, working), costs.sum_s(running))


def mean_s(costs: Costs, open_: Mapping[str, str], working: Mapping[str, str]) -> float:
    """Mean GPU-seconds of a job that waits."""
    running = counted(working)
    jobs = dict(_rest(counted(open_), running)) or running
    count = sum(jobs.values())
    if not count:
        return FIRST_GUESS_S if (mean := costs.of("")) is None else mean.gpu_s
    return costs.sum_s(jobs) / count


def counted(hash: Mapping[str, str]) -> dict[str, int]:
    """Counts by shape."""
    return {shape: int(count) for shape, count in hash.items()}


def _rest(jobs: Mapping[str, int], without: Mapping[str, int]) -> Iterator[tuple[str, int]]:
    for shape, count in jobs.items():
        left = count - without.get(shape, 0)
        if left > 0:
            yield shape, left


def eta_of(job: Mapping[str, str], live: int, outlook: Sequence[Any]) -> float | None:
    """When an open job should end, in seconds since 1970, or None where that is unknown.

    live: workers that serve its model. outlook: see ``read.lua``.
    """
    if not outlook or live == 0:
        return None
    now, ahead, *hashes = outlook
    open_, working, learned = (dict(zip(each[::2], each[1::2], strict=True)) for each in hashes)
    costs = Costs(learned)
    cost = costs.of(job.get("work", job["kind"]))
    if cost is None:
        return None
    now_s = int(now) / 1000
    if job["status"] == "running":
        return max(now_s, float(job["started_at"]) / 1000 + cost.run_s)
    if int(ahead) < 0:  # for a retry, at its time
        return max(now_s, float(job.get("due", now)) / 1000) + cost.run_s
    # What runs is half done, on average.
    before = int(ahead) * mean_s(costs, open_, working) + costs.sum_s(counted(working)) / 2
    return now_s + before / live + cost.run_s
