"""Takes items from fronts: checks them, finds room for their pixels, hands them to the backend."""

import logging
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import msgspec

from blipq_worker.inference.front import Front, Work
from blipq_worker.inference.interface import Backend, Handle, ItemFailed, Rows
from blipq_worker.inference.protocol import Forget, Known, Knows, ProtocolError, Submit
from blipq_worker.inference.requests import Failure, ImagePixels, Item, ModelInfo, Outcome
from blipq_worker.inference.stream import Frame

log = logging.getLogger(__name__)

_UNKNOWN = Failure(
    "image_unknown", "image_unknown", "this front has not sent the image lately: send its pixels"
)


class Intake:
    """What fronts may request of a backend. Raises ProtocolError for anything else.

    finish: called once for each item that was taken, when it is done; on any thread.
    """

    def __init__(
        self,
        backend: Backend,
        rows: Rows,
        credits: int,
        finish: Callable[[Work, Outcome], None],
    ) -> None:
        self.models = dict(backend.models())
        self._backend, self._rows, self._credits = backend, rows, credits
        self._finish = finish
        self._works: dict[Handle, Work] = {}

    def lend(self, front: Front, message: Any, size: int) -> memoryview | None:
        """Room for an item's pixels, once all is checked that can be checked before they come."""
        self._check(front, message, size)
        return self._rows.lend(size)

    def submit(self, front: Front, frame: Frame, message: Submit) -> None:
        """Takes an item."""
        work = Work(front, frame.id, frame.pixels)
        try:
            self._check(front, message, 0 if frame.pixels is None else frame.pixels.nbytes)
            if frame.id in front.works:
                raise ProtocolError(f"the id {frame.id} is in use")
        except ProtocolError:
            self.give_back(work)
            raise
        front.works[frame.id] = work
        deadline = None if message.seconds is None else time.monotonic() + message.seconds
        done = partial(self._finish, work)
        try:
            item = self._whole(front, message, frame.pixels)
            work.handle = self._backend.submit(
                message.model,
                item,
                message.priority,
                deadline,
                done,
                message.alone,
                message.trace,
            )
            self._works[work.handle] = work
        except ItemFailed as error:
            done(error.failure)
        except Exception as error:
            log.exception("engine: an item was not taken")
            done(Failure("internal", "internal", str(error)))

    def cancel(self, work: Work) -> None:
        """Nobody waits for the item any more."""
        if work.handle is None:  # it was refused
            return
        try:
            self._backend.cancel(work.handle)
        except Exception:
            log.exception("engine: an item was not cancelled")

    def known(self, front: Front, message: Knows) -> Known:
        """Which images need no look: of those that the front has named before."""
        self._model(message.model)
        digests = [front.names.get(message.model, name) for name in message.digests]
        named = [digest for digest in digests if digest is not None]
        known = iter(self._backend.knows(message.model, named, message.features))
        return Known(tuple(digest is not None and next(known) for digest in digests))

    def forget(self, front: Front, message: Forget) -> None:
        """Drops what is known of images, of those that the front has named before.

        Other fronts may use the same pixels under their own names: they send them again.
        """
        for model in self.models:
            digests = [front.names.forget(model, name) for name in message.digests]
            if named := {digest for digest in digests if digest is not None}:
                self._backend.forget(model, named)

    def works_of(self, handles: Iterable[Handle]) -> list[Work]:
        """Those of these items that have no answer yet."""
        return [self._works[handle] for handle in handles if handle in self._works]

    def give_back(self, work: Work) -> None:
        """The item is over: its pixels are not read any more."""
        if work.handle is not None:
            self._works.pop(work.handle, None)
        if work.row is not None:
            self._rows.take_back(work.row)
            work.row = None

    def _model(self, name: str) -> ModelInfo:
        model = self.models.get(name)
        if model is None:
            raise ProtocolError(f"no model {name!r} is served")
        return model

    def _check(self, front: Front, message: Submit, size: int) -> None:
        if not front.greeted:
            raise ProtocolError("Hello must come first")
        if len(front.works) >= self._credits:
            raise ProtocolError(f"more than {self._credits} items without an answer")
        model, image = self._model(message.model), message.item.image
        wanted = 0 if image is None else model.pixels_size
        if size not in (0, wanted):
            raise ProtocolError(f"{size:,} bytes of pixels, where the model takes {wanted:,}")
        if image is not None and not size and image.digest is None:
            raise ProtocolError("an image without pixels and without a digest")

    def _whole(self, front: Front, message: Submit, pixels: memoryview | None) -> Item:
        """The item with its pixels, its image named as in the engine."""
        image = message.item.image
        if image is None:
            return message.item
        views = () if pixels is None else self._model(message.model).split(pixels)
        digest = image.digest
        if digest is not None and pixels is not None:
            digest = front.names.learned(message.model, digest, pixels)
        elif digest is not None:
            digest = front.names.get(message.model, digest)
            if digest is None:
                raise ItemFailed(_UNKNOWN)
        origin = front.origins.setdefault((image.origin.number, digest), image.origin)
        whole = ImagePixels(digest, image.whole, views, origin)
        return msgspec.structs.replace(message.item, image=whole)
