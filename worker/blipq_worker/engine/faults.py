"""Tells a job's failure from that of the model or its device.

After an illegal access on a GPU every later call fails too, with an ordinary RuntimeError: a worker
that went on would fail the whole queue, faster than any healthy one beside it works.
"""

import logging
import re
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from typing import Any

from blipq.errors import BlipqError, WorkError

log = logging.getLogger(__name__)

#: Jobs of a model that fail one after the other before it is checked.
IN_A_ROW = 3

_DEVICE = re.compile(
    r"\b(CUDA|HIP)( driver)? error|\b(CUBLAS|CUSOLVER|CUDNN|HIPBLAS|MIOPEN)_STATUS_|cuDNN error",
    re.I,
)
#: Of a library that has no such kernel, or of memory: the next call may well succeed.
_HARMLESS = re.compile(
    r"out of memory|_(ALLOC_FAILED|NOT_SUPPORTED|INVALID_VALUE|BAD_PARAM)\b|invalid device ordinal",
    re.I,
)
_MEMORY = re.compile(r"out of memory|_ALLOC_FAILED\b", re.I)


class DeviceLost(BlipqError):
    """Nothing on the device works in this process; in the next one it may."""


def is_device_fault(error: BaseException) -> bool:
    """Whether nothing on the device will work in this process any more."""
    return any(
        (type(each).__name__ == "AcceleratorError" or _DEVICE.search(str(each)) is not None)
        and not is_out_of_memory(each)
        and _HARMLESS.search(str(each)) is None
        for each in _chain(error)
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether there was no memory, on the host or on the device."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and bool(_DEVICE.search(text) and _MEMORY.search(text))


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error and what it was raised from."""
    each: BaseException | None = error
    for _ in range(10):  # a chain may be a ring
        if each is None:
            return
        yield each
        each = each.__cause__ or each.__context__


class Trust:
    """How far the models are trusted, by how their items fare: a ``batching.interface.Judge``.

    lost: called with a fault of the device, and ends the process. check: raises if a model, by its
    name, answers nonsense; None: nobody knows. refuse: called with why nothing more may be run.
    """

    def __init__(
        self,
        *,
        lost: Callable[[Exception], None],
        check: Callable[[str], None] | None,
        refuse: Callable[[str], None],
    ) -> None:
        self._lost = lost
        self._check = check
        self._refuse = refuse
        self._failures: Counter[str] = Counter()
        self._last: Any = None

    def failed(self, key: Hashable, item: Any, error: Exception) -> None:
        """Items of a key failed; ``item``: the one that failed alone, or None."""
        if is_device_fault(error):
            self._lost(error)
        if item is None or self._check is None:
            return
        if isinstance(error, WorkError) or is_out_of_memory(error):
            return
        origin = getattr(getattr(item, "image", None), "origin", None)
        if origin is None or origin is not self._last:  # else it is another item of the same job
            self._failures[_model(key)] += 1
        self._last = origin

    def answered(self, key: Hashable) -> None:
        """Items of a key were answered."""
        if self._failures:
            del self._failures[_model(key)]
        self._last = None

    def doubts(self) -> bool:
        """Whether a model is to be checked before anything else runs."""
        return any(count >= IN_A_ROW for count in self._failures.values())

    def trusts(self) -> bool:
        """Checks the model that is in doubt. False: it is not to be run any more."""
        assert self._check is not None, "without a check there are no doubts"
        name, count = self._failures.most_common(1)[0]
        log.warning("%d jobs of model %r failed in a row: checking it", count, name)
        self._failures.clear()
        try:
            self._check(name)
        except Exception as error:
            if is_device_fault(error):
                self._lost(error)
            self._refuse(f"model {name!r} failed its check: {error}")
            return False
        log.info("model %r is well", name)
        return True


def _model(key: Hashable) -> str:
    """The model's name, which the engine's keys begin with."""
    return str(key[0])  # type: ignore[index]
