"""An engine process without a model, whose prompts say what it does with an item.

``python engine_stand_in.py FOLDER``. "run ..." begins a pass and does not end it, "wait ..." stays
in its queue, "die ..." ends the process in a pass of its own, others answer at once. It prints a
line for each item as it has it: ``begun`` or ``queued`` and the prompt, and whether it is alone.
After SIGTERM it says goodbye.
"""

import itertools
import os
import signal
import sys
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[3]))

from benchmarks.stand_ins import model_info

from blipq_worker.inference import (
    Answer,
    EngineServer,
    Failure,
    Feature,
    Generate,
    Generated,
    GeneratedText,
    Item,
    Load,
    ModelInfo,
    Outcome,
    Priority,
    Reading,
    Recipe,
)

ROOT = Path(__file__).parents[3]
INFO = model_info(
    recipe=Recipe(64, 3, "stand-in"),
    reading=Reading(str(ROOT / "worker/blipq_worker/demo/models/opt"), 512),
)


class Backend:
    """Does with items as their prompts say, between polls."""

    def __init__(self) -> None:
        self._numbers = itertools.count(1)
        self._open: dict[int, Callable[[Outcome], None]] = {}
        self._new: list[tuple[int, str, bool]] = []

    def models(self) -> Mapping[str, ModelInfo]:
        return {"default": INFO}

    def submit(
        self,
        model: str,
        item: Item,
        priority: Priority,
        deadline: float | None,
        done: Callable[[Outcome], None],
        alone: bool = False,
        trace: str = "",
    ) -> int:
        assert isinstance(item, Generate)
        number = next(self._numbers)
        self._open[number] = done
        self._new += [(number, item.prompts[0], alone)]
        return number

    def cancel(self, handle: Any) -> None:
        done = self._open.pop(handle, None)
        if done is not None:
            done(Failure("cancelled", "internal", "nobody waits for it"))

    def knows(
        self, model: str, digests: Sequence[str], features: Collection[Feature]
    ) -> Sequence[bool]:
        return [False for _ in digests]

    def forget(self, model: str, digests: Collection[str]) -> None:
        print(f"forgets {len(digests)} of {model}", flush=True)

    def load(self) -> Load:
        return Load(0, len(self._open))

    def turn(self, server: EngineServer) -> None:
        """What the new items ask for."""
        new, self._new = self._new, []
        for number, prompt, alone in new:
            word = prompt.split()[0] if prompt else ""
            if word in ("run", "die"):
                server.started([number])
            state = "queued" if word == "wait" else "begun"
            print(f"{state} {prompt}{' alone' if alone else ''}", flush=True)
            if word == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            if word not in ("run", "wait"):
                text = GeneratedText(f"did {prompt}", 1)
                self._open.pop(number)(Answer(Generated(((text,),)), 1.0, 0.5, 1))


def main() -> None:
    backend = Backend()
    server = EngineServer(Path(sys.argv[1]) / "engine.sock", backend)
    print("listens", flush=True)
    ending = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: ending.set())
    while not ending.is_set():
        server.poll(0.02)
        server.progress()
        backend.turn(server)
    server.close()


if __name__ == "__main__":
    main()
