"""Replays cases on the served model, then on the candidate, and holds both against each other."""

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import torch

from blipq.errors import BlipqError, InvalidRequest, WorkError
from blipq.s3.storage import Storage
from blipq.settings import Settings
from blipq_worker.assembly import fetcher_of, limits_of
from blipq_worker.compare.cases import Case, Skipped
from blipq_worker.compare.difference import Comparison, Pair, failed, pair_of
from blipq_worker.compare.pictures import Pictures, kept_on_disk
from blipq_worker.compare.replay import Observed, answered, answered_beside
from blipq_worker.engine.faults import DeviceLost, is_device_fault
from blipq_worker.inference.requests import ModelInfo
from blipq_worker.serving.loader import load_models
from blipq_worker.settings import WorkerSettings

if TYPE_CHECKING:
    from blipq_worker.blip2 import Blip2

#: So many pictures in a row that cannot be had now are an outage, and no reason to wait for more.
OUTAGE = 5

#: Of a text of a library's error.
LONGEST = 300

#: Called with the cases that are done, and all that there are to do.
Progress = Callable[[int, int], None]


@contextmanager
def album(settings: Settings, options: WorkerSettings) -> Iterator[Pictures]:
    """The pictures of cases, kept on disk as long as they are needed. Raises InvalidRequest."""
    storage = Storage(settings, read_timeout_s=min(10.0, options.fetch_timeout_s))
    with kept_on_disk("TMPDIR"):
        folder = TemporaryDirectory(prefix="blipq-compare-", ignore_cleanup_errors=True)
    with folder as path:
        fetcher = fetcher_of(settings, options, storage)
        yield Pictures(fetcher, limits_of(options), Path(path))


@dataclass(frozen=True, slots=True)
class Guard:
    """Compares models, each as ``BLIPQ_MODELS`` names it, on what these pictures belong to.

    options: of both models, in the same precision. progress: is called after each case.
    """

    pictures: Pictures
    options: WorkerSettings
    progress: Progress = lambda done, of: None

    def compare(
        self, served: str, candidate: str, cases: Sequence[Case], skipped: Sequence[Skipped] = ()
    ) -> Comparison:
        """Replays cases on the served model, then on the other one.

        skipped: what could not be replayed from the start. Raises ModelError, InvalidRequest where
        nothing is left to compare or pictures cannot be kept, TransientError where their store is
        away, and DeviceLost.
        """
        info, answers, left_out = self._served(served, cases)
        left_out = [*skipped, *left_out]
        if not answers:
            why = f": {left_out[0].name}: {left_out[0].why}" if left_out else ""
            raise InvalidRequest(f"there is no job to replay{why}")
        pairs = []
        with self._loaded(candidate) as model:
            self._warm(model, answers[0][0])
            for number, (case, observed) in enumerate(answers, 1):
                pairs.append(self._pair(model, case, observed))
                self.progress(len(cases) + number, len(cases) + len(answers))
            return Comparison(info, model.info, pairs, left_out)

    def _served(
        self, what: str, cases: Sequence[Case]
    ) -> tuple[ModelInfo, list[tuple[Case, Observed]], list[Skipped]]:
        answers: list[tuple[Case, Observed]] = []
        skipped: list[Skipped] = []
        away = 0
        with self._loaded(what) as model:
            for number, case in enumerate(cases, 1):
                try:
                    if not answers:
                        self._warm(model, case)
                    answers.append((case, answered(model, case, self.pictures)))
                    away = 0
                except WorkError as error:  # of the picture, or of what the model has no head for
                    away = away + 1 if error.retryable else 0
                    if away == OUTAGE:
                        raise
                    skipped.append(Skipped(case.name, f"{error.code}: {error}"))
                except BlipqError:
                    raise
                except Exception as error:
                    skipped.append(Skipped(case.name, _broken(case, error)))
                self.progress(number, 2 * len(cases))
            return model.info, answers, skipped

    def _warm(self, model: "Blip2", case: Case) -> None:
        """Has the first pass, which takes longer than others, belong to no case."""
        try:
            answered(model, case, self.pictures)
        except WorkError:
            return  # it is met again, where it counts
        except BlipqError:
            raise
        except Exception as error:
            _broken(case, error)

    def _pair(self, model: "Blip2", case: Case, served: Observed) -> Pair:
        try:
            return pair_of(case, served, answered_beside(model, case, self.pictures, served))
        except WorkError as error:
            return failed(case, served, f"{error.code}: {error}")
        except BlipqError:
            raise
        except Exception as error:
            return failed(case, served, _broken(case, error))

    @contextmanager
    def _loaded(self, what: str) -> Iterator["Blip2"]:
        """A model, alone: the memory of the one before is free again."""
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        (model,) = load_models(
            self.options.model_copy(update={"models": {"compared": what}})
        ).values()
        yield model


def _broken(case: Case, error: Exception) -> str:
    """What a library raised of a job, on one line. Raises DeviceLost where no other one can run."""
    reason = " ".join(f"{type(error).__name__}: {error}".split())[:LONGEST]
    if is_device_fault(error):
        raise DeviceLost(f"the device is lost with {case.name}: {reason}") from error
    return reason
