"""How far two models are apart on a case, and what counts as a change."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import inf, isfinite
from typing import Any

import numpy as np

from blipq_worker.compare.cases import Case, Skipped
from blipq_worker.compare.replay import LIKELIHOODS, LOGITS, SCORES, Observed
from blipq_worker.inference.requests import ModelInfo
from blipq_worker.kinds.arrays import Numbers
from blipq_worker.serving.goldens import words_in_common

#: Numbers that are compared one by one, by their largest difference; features as a whole, by the
#: length of the difference over that of the served model's.
SINGLE = frozenset({LIKELIHOODS, SCORES, LOGITS})
#: In fp32, on one machine and with the same shapes a model that is unchanged differs by rounding
#: at most: where memory lies decides on the order of sums.
LIMIT_SINGLE = 1e-4
LIMIT_FEATURES = 1e-6


def limit_of(name: str) -> float:
    """The largest distance of numbers that are no change."""
    return LIMIT_SINGLE if name in SINGLE else LIMIT_FEATURES


def distance(name: str, one: Numbers, other: Numbers | None) -> float:
    """How far numbers are apart: 0 where they are equal, infinite where they cannot be compared."""
    if other is None or one.shape != other.shape:
        return inf
    first, second = one.astype(np.float64), other.astype(np.float64)
    between = np.abs(first - second)
    if name in SINGLE:
        found = float(between.max(initial=0.0))
    else:
        length = float(np.linalg.norm(first))
        found = float(np.linalg.norm(between)) / (length or 1.0)
    return found if isfinite(found) else inf


def cosine(one: Numbers, other: Numbers | None) -> float | None:
    """The cosine between features; None where they have no angle."""
    if other is None or one.shape != other.shape:
        return None
    first, second = one.astype(np.float64), other.astype(np.float64)
    lengths = float(np.linalg.norm(first) * np.linalg.norm(second))
    found = float(first @ second) / lengths if lengths else None
    return found if found is not None and isfinite(found) else None


@dataclass(frozen=True)
class Pair:
    """A case, and what both models made of it, without their features.

    distances, cosines: by name of the numbers; the latter of features alone. failure: why the
    candidate has no answer, where the served model has one.
    """

    case: Case
    served: Sequence[str]
    candidate: Sequence[str]
    distances: Mapping[str, float]
    cosines: Mapping[str, float]
    texts: int
    rewritten: int
    common: float
    served_ms: float
    candidate_ms: float | None
    failure: str | None = None

    @cached_property
    def beyond(self) -> dict[str, float]:
        """The distances over their limits, by how many times, the largest first."""
        times = {name: found / limit_of(name) for name, found in self.distances.items()}
        return dict(sorted(((n, t) for n, t in times.items() if t > 1), key=lambda each: -each[1]))

    @property
    def changed(self) -> bool:
        """Whether the candidate differs from the served model in anything."""
        return self.failure is not None or bool(self.rewritten or self.beyond)

    @property
    def badness(self) -> tuple[bool, float, float]:
        """Greater is worse: a failure, then fewer words in common, then greater distances."""
        return self.failure is not None, 1 - self.common, max(self.beyond.values(), default=0.0)


def pair_of(case: Case, served: Observed, candidate: Observed) -> Pair:
    """Holds two answers against each other."""
    numbers = candidate.numbers
    found = {name: distance(name, each, numbers.get(name)) for name, each in served.numbers.items()}
    angles = {
        name: angle
        for name, each in served.numbers.items()
        if name not in SINGLE and (angle := cosine(each, numbers.get(name))) is not None
    }
    texts = max(len(served.texts), len(candidate.texts))
    same = sum(map(str.__eq__, served.texts, candidate.texts))
    return Pair(
        case=case,
        served=served.lines,
        candidate=candidate.lines,
        distances=found,
        cosines=angles,
        texts=texts,
        rewritten=texts - same,
        common=words_in_common((" ".join(served.texts),), (" ".join(candidate.texts),)),
        served_ms=served.ms,
        candidate_ms=candidate.ms,
    )


def failed(case: Case, served: Observed, failure: str) -> Pair:
    """A case that the candidate does not answer."""
    return Pair(
        case=case,
        served=served.lines,
        candidate=(),
        distances={},
        cosines={},
        texts=len(served.texts),
        rewritten=len(served.texts),
        common=0.0,
        served_ms=served.ms,
        candidate_ms=None,
        failure=failure,
    )


@dataclass(frozen=True, slots=True)
class Farthest:
    """Numbers of one name over all pairs: how many are beyond the limit, and the worst of them."""

    name: str
    pairs: int
    beyond: int
    distance: float
    cosine: float | None

    @property
    def limit(self) -> float:
        return limit_of(self.name)


@dataclass(frozen=True)
class Comparison:
    """What was found. pairs: in the order of the cases."""

    served: ModelInfo
    candidate: ModelInfo
    pairs: Sequence[Pair]
    skipped: Sequence[Skipped]

    @cached_property
    def changed(self) -> bool:
        """Whether the candidate is another model, as far as can be seen."""
        return any(pair.changed for pair in self.pairs)

    def worst(self, most: int) -> list[Pair]:
        """The pairs that changed, the worst first."""
        changed = [pair for pair in self.pairs if pair.changed]
        return sorted(changed, key=lambda pair: pair.badness, reverse=True)[:most]

    @property
    def texts(self) -> int:
        return sum(pair.texts for pair in self.pairs)

    @property
    def rewritten(self) -> int:
        return sum(pair.rewritten for pair in self.pairs)

    @property
    def failures(self) -> int:
        return sum(pair.failure is not None for pair in self.pairs)

    @cached_property
    def farthest(self) -> list[Farthest]:
        """Of each name of numbers."""
        names = dict.fromkeys(name for pair in self.pairs for name in pair.distances)
        return [self._farthest(name) for name in names]

    def _farthest(self, name: str) -> Farthest:
        found = [pair.distances[name] for pair in self.pairs if name in pair.distances]
        angles = [pair.cosines[name] for pair in self.pairs if name in pair.cosines]
        beyond = sum(each > limit_of(name) for each in found)
        return Farthest(name, len(found), beyond, max(found), min(angles, default=None))

    def latency(self, share: float) -> tuple[float, float]:
        """A quantile of both models' times, in milliseconds, over what both answered."""
        both = [pair for pair in self.pairs if pair.candidate_ms is not None]
        if not both:
            return 0.0, 0.0
        served = np.quantile([pair.served_ms for pair in both], share)
        candidate = np.quantile([pair.candidate_ms or 0.0 for pair in both], share)
        return float(served), float(candidate)

    def as_dict(self, worst: int) -> dict[str, Any]:
        """The comparison as JSON has it; an infinite distance is None."""
        return {
            "changed": self.changed,
            "served": _model(self.served),
            "candidate": _model(self.candidate),
            "jobs": len(self.pairs),
            "changed_jobs": sum(pair.changed for pair in self.pairs),
            "failed_jobs": self.failures,
            "texts": {"compared": self.texts, "changed": self.rewritten},
            "numbers": {
                each.name: {
                    "limit": each.limit,
                    "worst": _finite(each.distance),
                    "cosine": each.cosine,
                    "jobs": each.pairs,
                    "changed_jobs": each.beyond,
                }
                for each in self.farthest
            },
            "latency_ms": {
                name: dict(zip(("served", "candidate"), self.latency(share), strict=True))
                for name, share in (("p50", 0.5), ("p95", 0.95))
            },
            "worst": [_pair(pair) for pair in self.worst(worst)],
            "skipped": [{"job": each.name, "why": each.why} for each in self.skipped],
        }


def _finite(value: float) -> float | None:
    return value if isfinite(value) else None


def _model(info: ModelInfo) -> dict[str, Any]:
    names = ("checkpoint", "revision", "retrieval_revision", "dtype", "quantization", "device")
    return {name: getattr(info, name) for name in names}


def _pair(pair: Pair) -> dict[str, Any]:
    return {
        "job": pair.case.name,
        "kind": pair.case.request.kind,
        "served": list(pair.served),
        "candidate": list(pair.candidate),
        "failure": pair.failure,
        "distances": {name: _finite(found) for name, found in pair.distances.items()},
    }
