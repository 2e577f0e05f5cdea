"""From a claimed job to its result: fetch, decode, inference, write the output."""

import logging
import threading
from concurrent.futures import CancelledError
from dataclasses import dataclass
from functools import partial
from typing import NoReturn

from pydantic import ValidationError

from blipq.contract import ErrorCode, ImageRef, MatchResult, Request, Result, request_adapter
from blipq.errors import PermanentError, TransientError, WorkError
from blipq.ledger.worker import Claim
from blipq.rights import Named, Rights
from blipq.submission import explain
from blipq_worker.claims import Held, Lost
from blipq_worker.engine.faults import is_out_of_memory
from blipq_worker.images.loader import Pictures
from blipq_worker.inference.interface import Inference, ItemFailed
from blipq_worker.inference.requests import Feature, ImagePixels
from blipq_worker.jobs.asker import engine_errors
from blipq_worker.jobs.heat_maps import heat_map_sheet, is_explained
from blipq_worker.jobs.index_asker import IndexAccess, IndexAsker
from blipq_worker.jobs.outputs import Outputs
from blipq_worker.kinds.registry import spec_of
from blipq_worker.receipt import Stopwatch

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Made:
    """A result as JSON, and the object that holds it where the ledger is not to."""

    result: str
    uri: str | None = None


class Execution:
    """Computes results. timeout_s: longest wait for the model or an index."""

    def __init__(
        self,
        inference: Inference,
        pictures: Pictures,
        outputs: Outputs,
        indexes: IndexAccess,
        held: Held,
        *,
        timeout_s: float,
    ) -> None:
        self._inference = inference
        self._pictures = pictures
        self._outputs = outputs
        self._indexes = indexes
        self._held = held
        self._timeout_s = timeout_s

    def result(self, claim: Claim, watch: Stopwatch) -> Made:
        """The job's result. Raises WorkError for every failure, and Lost."""
        try:
            with engine_errors():
                return self._result(claim, watch)
        except WorkError as error:
            _log_fault(claim, error)
            raise
        except Lost:
            raise
        except CancelledError as error:
            raise Lost from error
        except TimeoutError as error:
            message = f"timed out: {error}"
            raise TransientError(ErrorCode.INTERNAL, message) from error
        except Exception as error:
            _raise_internal(claim, error)

    def _result(self, claim: Claim, watch: Stopwatch) -> Made:
        request = _parsed(claim.request)
        _check_rights(claim, request)
        spec = spec_of(request)
        lost = self._held.event(claim)
        ref = spec.image_of(request)
        needed = spec.needs(request)
        asker = self._asker(claim, ref, needed, watch, lost)
        drawn = bool(claim.output) and is_explained(request)
        self._outputs.check(claim, ref, drawn=drawn)
        image = None
        if ref is not None:
            marked = partial(self._held.decoding, claim)
            # What is drawn on are the pixels, also of an image that the model knows.
            image = self._pictures.load(
                ref, claim.model, needed, watch, lost, spare=not drawn, marked=marked
            )
        if lost.is_set():
            raise Lost
        answer = spec.answer(request, image, asker)
        for note in asker.notes:
            watch.note(note)
        if asker.shared:
            watch.record(shared=True)
        if drawn:
            self._draw(claim, answer, image)
        result = answer.model_dump_json(exclude_none=True)
        self._outputs.write(claim, result)
        return Made(result, self._outputs.place(claim, result))

    def _draw(self, claim: Claim, answer: Result, image: ImagePixels | None) -> None:
        assert isinstance(answer, MatchResult)
        assert image is not None
        maps = [scored.map for scored in answer.scores if scored.map is not None]
        side = self._inference.model(claim.model).recipes[-1].side
        png = heat_map_sheet(maps, image.pixels[-1], side, self._pictures.size_of(image))
        self._outputs.write_heat_map(claim, png)

    def _asker(
        self,
        claim: Claim,
        ref: ImageRef | None,
        needed: frozenset[Feature],
        watch: Stopwatch,
        lost: threading.Event,
    ) -> IndexAsker:
        load_one = partial(self._pictures.load, marked=partial(self._held.decoding, claim))

        def reload() -> ImagePixels:
            """The job's image again, with its pixels."""
            assert ref is not None, "only an image can have been forgotten"
            return load_one(ref, claim.model, needed, watch, lost, spare=False)

        def load(found: ImageRef, spare: bool) -> ImagePixels:
            """An image found in an index: the receipt counts it as part of the search."""
            unread = Stopwatch(queue_ms=0, worker="")
            return load_one(found, claim.model, {"patches"}, unread, lost, spare=spare)

        return IndexAsker(
            self._inference,
            claim,
            self._held,
            watch,
            self._timeout_s,
            reload=reload,
            indexes=self._indexes,
            load=load,
        )


def _parsed(text: str) -> Request:
    try:
        return request_adapter.validate_json(text)
    except ValidationError as error:
        raise PermanentError(ErrorCode.INVALID_REQUEST, explain(error, Request)) from None


def _check_rights(claim: Claim, request: Request) -> None:
    """What the key of a job's submitter allows holds here, too, whoever wrote the record."""
    if not claim.rights:
        return
    try:
        rights = Rights.model_validate_json(claim.rights)
    except ValidationError:
        message = "rights: they cannot be read"
        raise PermanentError(ErrorCode.INVALID_REQUEST, message) from None
    named = Named(claim.model, claim.output, claim.webhook_url)
    refusal = rights.refusal(request, named)
    if refusal is not None:
        code = _CODES.get(refusal.list, ErrorCode.INVALID_REQUEST)
        raise PermanentError(code, f"{refusal} of its key")


#: Of what a job may not name, by the list that lacks it.
_CODES = {"buckets": ErrorCode.IMAGE_FORBIDDEN, "image_hosts": ErrorCode.URL_FORBIDDEN}


def _log_fault(claim: Claim, error: WorkError) -> None:
    """Logs where the model failed, which only the engine saw, under the job's id."""
    cause = error.__cause__
    if isinstance(cause, ItemFailed) and cause.failure.kind == "internal":
        log.error("%s: %s\n%s", claim.id, cause.failure.message, cause.failure.trace)


def _raise_internal(claim: Claim, error: Exception) -> NoReturn:
    """A bug: the job fails at once, with the cause in the worker's log."""
    if is_out_of_memory(error):
        message = "there was not enough memory for this job"
        raise PermanentError(ErrorCode.OUT_OF_MEMORY, message) from error
    log.error("%s: %s", claim.id, error, exc_info=error)
    message = f"{type(error).__name__}: {error}"
    raise PermanentError(ErrorCode.INTERNAL, message) from error
