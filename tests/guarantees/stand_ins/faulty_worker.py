"""A real worker around a model that does what the caption's prompt tells it.

Everything but the model is what ships: Celery, ledger, leases, fetch, decode and batcher, in one
process, or with ``BLIPQ_FRONTS`` in a main process, an engine and fronts. Prompts: "exit" and
"segfault" end the process, "hang" never returns, "raise" raises, "oom" runs out of memory,
"oom-in-company" only beside other items, "sleep N" takes N seconds, "steps N" takes N steps, "stop"
waits where a test stops it, "clock N" sets the process' clock N seconds on, "lose-device" leaves a
device on which every later call fails, others answer at once. Pictures of two sizes hang and crash
their decoder. ``FAULTY_CONTRACT`` makes it a worker of an older or newer version. With
``FAULTY_DEVICE=lost`` it has lost its device; with ``FAULTY_DEVICE=nonsense`` every job fails, and
so does the check of the model. ``FAULTY_STOPS``: see ``stops``.
"""

import logging
import os
import secrets
import signal
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[3]))
sys.path.insert(0, str(Path(__file__).parents[2]))

from blipq.backoff import Backoff
from blipq.ledger import worker
from blipq.local import supervisor
from blipq.settings import Settings
from blipq_worker import __main__ as program
from blipq_worker.images import loader
from blipq_worker.images.fetch import Fetched, Fetcher
from blipq_worker.reading import Readers
from blipq_worker.settings import WorkerSettings
from guarantees.stand_ins import stops

#: Pictures of these sizes hang their decoder, or crash it.
HANGING_SIZE = (13, 13)
CRASHING_SIZE = (11, 11)


def _break_decoder() -> None:
    pixels_of = loader.pixels_of

    def made(image: Any, recipes: Any) -> Any:
        stops.at("decoding")
        if image.size == HANGING_SIZE:
            threading.Event().wait()
        if image.size == CRASHING_SIZE:
            # To this thread: sent to the process, it might come after the decoder has returned.
            signal.pthread_kill(threading.get_ident(), signal.SIGSEGV)
        return pixels_of(image, recipes)

    loader.pixels_of = made


def _make_no_two_images_equal() -> None:
    """So that no two jobs are: each does what its prompt says."""
    fetch = Fetcher.fetch

    def fetched(self: Fetcher, image: Any, *, unless: str | None = None, sized: Any) -> Fetched:
        stops.at("fetching")
        found = fetch(self, image, sized=sized)
        return replace(found, digest=secrets.token_hex(32))

    Fetcher.fetch = fetched  # type: ignore[method-assign, assignment]


def _take_any_text() -> None:
    """The model has no tokenizer."""
    Readers.check = lambda self, model, item: None  # type: ignore[method-assign]


def main() -> int:
    """Becomes what the command line names, as ``python -m blipq_worker`` does."""
    logging.basicConfig(level="INFO", format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    if "FAULTY_CONTRACT" in os.environ:
        worker.CONTRACT = int(os.environ["FAULTY_CONTRACT"])
    supervisor.RESTARTS = Backoff(0.2, 1.0)  # a day's trouble in minutes
    _break_decoder()
    _make_no_two_images_equal()
    match sys.argv[1:]:
        case ["engine", "--run", folder]:
            return _engine(Path(folder))
        case ["front", *_]:
            _take_any_text()
            stops.stop_fronts()
            return program.main()
        case _:
            return _worker()


def _engine(folder: Path) -> int:
    from blipq_worker.serving import engine
    from guarantees.stand_ins import faulty_model

    engine.load_models = lambda options, opening=None: _models(options)
    engine.checker = lambda options, models: faulty_model.check
    return engine.run_engine(folder, WorkerSettings())


def _worker() -> int:
    options = WorkerSettings()
    if options.fronts:
        from blipq_worker.supervision.worker import SplitWorker

        command = [sys.executable, __file__]
        return SplitWorker(Settings(), options, options.fronts, command).run()

    from blipq_worker.app import Worker
    from guarantees.stand_ins import faulty_model

    return Worker(Settings(), options, _models(options), check=faulty_model.check).run()


def _models(options: WorkerSettings) -> Any:
    from guarantees.stand_ins.faulty_model import FaultyModel, run_batches_alone

    run_batches_alone()
    return {name: FaultyModel() for name in options.models}


if __name__ == "__main__":
    sys.exit(main())
