"""What served models answered when they were known to be right, and how far others may differ.

A golden is recorded on the canary's pictures by ``blipq models record-golden``. blipq brings those
of the models that it could run itself, a checkpoint in S3 may bring its own, and ``BLIPQ_GOLDENS``
names a file with more. Without torch.
"""

import json
import logging
from collections import Counter
from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from blipq.errors import BlipqError
from blipq.files import whole_file
from blipq.submission import explain
from blipq_worker.catalog.s3.objects import Objects
from blipq_worker.catalog.s3.places import is_in_s3, place_of

log = logging.getLogger(__name__)


class GoldenError(BlipqError):
    """A file of goldens cannot be read; the message names it."""


class Observation(BaseModel):
    """What a model makes of the canary's pictures, in their order.

    answers: to the question about each picture. likelihoods: of the canary's texts as captions of
    each, natural logarithms. matches: of picture and text, probabilities; None without a retrieval
    checkpoint.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    captions: tuple[str, ...]
    answers: tuple[str, ...]
    likelihoods: tuple[tuple[float, ...], ...]
    matches: tuple[tuple[float, ...], ...] | None


class Golden(BaseModel):
    """An observation, and of what: the precision, and the revisions of both checkpoints."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    dtype: str
    quantization: str
    revisions: tuple[str, ...]
    said: Observation


class Tolerance(NamedTuple):
    """words: least share of words in common. likelihood, probability: largest differences."""

    words: float
    likelihood: float
    probability: float


#: What a checkpoint in S3 brings, where it was in its folder as that was pushed.
BESIDE = "goldens.json"

#: By precision: beyond these lies damage. Answers in fewer bits differ a little, and may.
TOLERANCES = {
    "float32": Tolerance(1.0, 0.1, 0.02),
    "16 bits": Tolerance(0.7, 1.0, 0.1),
    "int8": Tolerance(0.6, 2.0, 0.2),
    "nf4": Tolerance(0.5, 4.0, 0.3),
}

_Goldens = TypeAdapter(dict[str, Golden])


def read_goldens(file: Path | None = None) -> dict[str, Golden]:
    """Goldens by what is served (as in ``BLIPQ_MODELS``): blipq's, and over them the file's."""
    brought = (resources.files("blipq_worker.serving") / "goldens.json").read_text()
    return {**_Goldens.validate_json(brought), **(_read(file) if file else {})}


def golden_beside(checkpoint: str, what: str) -> Golden | None:
    """The golden of ``what`` that was pushed to S3 with its checkpoint; None without one.

    A file with a single golden is about that checkpoint, by whatever name it was recorded. Where
    several have other names, none is, which is logged. Raises GoldenError, and as ``Objects``.
    """
    if not is_in_s3(checkpoint):
        return None
    objects = Objects(place_of(checkpoint))
    manifest = objects.manifest()
    if BESIDE not in manifest.files:
        return None
    uri = objects.place.uri(BESIDE)
    goldens = _parsed(uri, objects.small(BESIDE, manifest))
    if len(goldens) == 1:
        return next(iter(goldens.values()))
    if what not in goldens:
        log.warning(
            "%s is held to no golden: %s has none of that name, but %s", what, uri, _some(goldens)
        )
    return goldens.get(what)


def _some(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)[:5]) or "none at all"


def _read(file: Path) -> dict[str, Golden]:
    try:
        data = file.read_bytes()
    except OSError as error:
        raise _unreadable(file, str(error)) from error
    return _parsed(file, data)


def _parsed(place: object, data: bytes) -> dict[str, Golden]:
    try:
        return _Goldens.validate_json(data.decode())
    except ValueError as error:
        reason = explain(error) if isinstance(error, ValidationError) else str(error)
        raise _unreadable(place, reason) from error


def _unreadable(place: object, reason: str) -> GoldenError:
    return GoldenError(f"{place} is no file of `blipq models record-golden`: {reason}")


def write_golden(file: Path, what: str, golden: Golden) -> None:
    """Adds a golden to a file, or replaces it there."""
    goldens = {**(_read(file) if file.exists() else {}), what: golden}
    written = {name: goldens[name].model_dump(mode="json") for name in sorted(goldens)}
    with whole_file(file) as whole:
        whole.write((json.dumps(written, indent=2) + "\n").encode())


def tolerance(*precisions: tuple[str, str]) -> Tolerance:
    """What is allowed between models of these precisions, each (dtype, quantization)."""
    allowed = [TOLERANCES[_bits(*precision)] for precision in precisions]
    return Tolerance(
        min(each.words for each in allowed),
        max(each.likelihood for each in allowed),
        max(each.probability for each in allowed),
    )


def _bits(dtype: str, quantization: str) -> str:
    method, _, vision = quantization.partition("+")
    if method == "none":
        return "float32" if dtype == "float32" else "16 bits"
    return "nf4" if vision else method


def difference(golden: Observation, now: Observation, allowed: Tolerance) -> str | None:
    """What is not as recorded, in words; None where all is."""
    expected, found = golden.captions + golden.answers, now.captions + now.answers
    if words_in_common(expected, found) < allowed.words:
        return f"its texts should be {_quoted(expected)}, and are {_quoted(found)}"
    if _farthest(golden.likelihoods, now.likelihoods) > allowed.likelihood:
        return (
            f"its log-likelihoods should be {golden.likelihoods}, within {allowed.likelihood}, and "
            f"are {now.likelihoods}"
        )
    if golden.matches is None or now.matches is None:
        return None
    if _farthest(golden.matches, now.matches) > allowed.probability:
        return (
            f"its matching probabilities should be {golden.matches}, within "
            f"{allowed.probability}, and are {now.matches}"
        )
    return None


def words_in_common(expected: tuple[str, ...], found: tuple[str, ...]) -> float:
    """The share of words that texts have in common, pair by pair; 1 where all are equal."""
    common = words = 0
    for first, second in zip(expected, found, strict=True):
        one, other = Counter(first.split()), Counter(second.split())
        common += 2 * (one & other).total()
        words += one.total() + other.total()
    return common / words if words else 1.0


def _farthest(recorded: tuple[tuple[float, ...], ...], now: tuple[tuple[float, ...], ...]) -> float:
    pairs = zip(recorded, now, strict=True)
    return max(abs(a - b) for rows in pairs for a, b in zip(*rows, strict=True))


def _quoted(texts: tuple[str, ...]) -> str:
    return ", ".join(repr(text) for text in texts)
