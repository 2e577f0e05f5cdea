"""Scripts that threads run at the same time, in one round trip.

A thread that comes while no round trip is under way makes one. Those that come meanwhile wait, and
the first of them makes the next, for all. So a lone call is sent at once, and no thread is needed.
"""

import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

#: The most calls of a round trip: Redis serves nobody else meanwhile.
MOST = 32


class _Call:
    """A call of a script by its hash, and what came of it."""

    def __init__(self, sha: str, args: Sequence[str | float]) -> None:
        self.sha = sha
        self.args = args
        self.answer: Any = None
        self.leads = False
        # Taken from the start, so that a second acquire waits for the leader's release.
        self.woken = threading.Lock()
        self.woken.acquire()


class Combined:
    """Calls of scripts on one Redis. A call takes up to two of its client's timeouts.

    pipeline: makes a pipeline that is no transaction.
    """

    def __init__(self, pipeline: Callable[[], Any]) -> None:
        self._pipeline = pipeline
        # Whoever finds no leader under the lock becomes it: a call either leads or is seen by one.
        self._lock = threading.Lock()
        self._waiting: deque[_Call] = deque()
        self._is_led = False

    def __call__(self, sha: str, args: Sequence[str | float]) -> Any:
        """The script's answer. Raises what the client raises for it; NoScriptError as well."""
        call = _Call(sha, args)
        with self._lock:
            self._waiting.append(call)
            call.leads = not self._is_led
            self._is_led = True
        if not call.leads:
            call.woken.acquire()
        if call.leads:
            self._lead()
        if isinstance(call.answer, BaseException):
            raise call.answer
        return call.answer

    def _lead(self) -> None:
        """One round trip for those that wait, this thread among them; then the next one leads."""
        with self._lock:
            calls = [self._waiting.popleft() for _ in range(min(MOST, len(self._waiting)))]
        try:
            self._answer(calls)
        finally:
            # The next leader is chosen before the answered calls wake: none of these waits for it.
            with self._lock:
                following = self._waiting[0] if self._waiting else None
                self._is_led = following is not None
            if following is not None:
                following.leads = True
                following.woken.release()
            for call in calls:
                if not call.leads:
                    call.woken.release()

    def _answer(self, calls: Sequence[_Call]) -> None:
        try:
            pipeline = self._pipeline()
            for call in calls:
                pipeline.evalsha(call.sha, 0, *call.args)
            answers = pipeline.execute(raise_on_error=False)
        except BaseException as error:
            answers = [error] * len(calls)
        for call, answer in zip(calls, answers, strict=True):
            call.answer = answer
