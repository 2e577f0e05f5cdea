"""``python -m blipq_worker``: one worker process (``blipq worker`` starts it), or a part of one."""

import argparse
import logging
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from blipq.errors import InvalidRequest
from blipq.ledger.connection import check_one_cell
from blipq.settings import Settings
from blipq.submission import checked
from blipq.telemetry import tracing
from blipq.telemetry.logs import set_up_logging
from blipq_worker.catalog.models import ModelError
from blipq_worker.catalog.s3.errors import S3ModelAway
from blipq_worker.catalog.s3.keys import forget_model_keys
from blipq_worker.engine.faults import DeviceLost
from blipq_worker.inference.address import AddressError
from blipq_worker.process.health import PortTaken, require_port
from blipq_worker.process.heartbeat import EXIT_HUNG
from blipq_worker.process.privacy import hide_keys_of_models
from blipq_worker.settings import WorkerSettings
from blipq_worker.startup import START
from blipq_worker.supervision.sizing import fronts_of

if TYPE_CHECKING:
    from blipq_worker.app import Worker
    from blipq_worker.supervision.worker import SplitWorker

#: A model cannot be loaded, or a setting is wrong: starting again would not help.
EXIT_MODEL = 78


def main() -> int:
    """Becomes what the command line names; the exit code."""
    match sys.argv[1:]:
        case ["engine", *arguments]:
            return _engine(arguments)
        case ["front", *arguments]:
            return _front(arguments)
        case _:
            return _worker()


def _engine(arguments: list[str]) -> int:
    """The process that runs the models: ``engine --run FOLDER``. It knows no Redis."""
    parser = argparse.ArgumentParser("python -m blipq_worker engine")
    parser.add_argument("--run", type=Path, required=True, help="folder for the engine's socket")
    folder = parser.parse_args(arguments).run
    hide_keys_of_models()
    try:
        _set_up_logging()
        options = checked(WorkerSettings)
    except InvalidRequest as error:
        print(f"blipq engine: {error}", file=sys.stderr)
        return EXIT_MODEL
    with START.part("imports"):
        from transformers.utils import logging as transformers_logging

        from blipq_worker.serving.engine import run_engine

    transformers_logging.disable_progress_bar()
    return run_engine(folder, options)


def _front(arguments: list[str]) -> int:
    """A process that takes jobs for the engine of its worker; it loads no model."""
    parser = argparse.ArgumentParser("python -m blipq_worker front")
    parser.add_argument("--run", type=Path, required=True, help="folder of the engine's socket")
    parser.add_argument("--number", type=int, required=True, help="of this front")
    parser.add_argument("--of", type=int, required=True, help="the number of fronts")
    parser.add_argument("--worker", required=True, help="name under which jobs are claimed")
    given = parser.parse_args(arguments)
    with START.part("imports"):
        from blipq_worker.front import Front
        from blipq_worker.fronts.seat import Seat

    seat = Seat(given.run, given.number, given.of, given.worker)
    try:
        settings, options = _settings(f"front-{seat.number}")
        front = Front(settings, options, seat)
    except (InvalidRequest, AddressError) as error:
        print(f"blipq front: {error}", file=sys.stderr)
        return EXIT_MODEL
    return front.run()


def _worker() -> int:
    """Loads the models, then works until it is stopped."""
    try:
        worker = _loaded()
    except (InvalidRequest, ModelError) as error:
        print(f"blipq worker: {error}", file=sys.stderr)
        return EXIT_MODEL
    except DeviceLost as error:
        print(f"blipq worker: {error}", file=sys.stderr)
        return EXIT_HUNG
    except (PortTaken, S3ModelAway) as error:  # starting again can help
        print(f"blipq worker: {error}", file=sys.stderr)
        return 1
    return worker.run()


def _loaded() -> "Worker | SplitWorker":
    """The worker with its models, or with the processes that will have them.

    Raises InvalidRequest for settings, ModelError, DeviceLost, PortTaken, S3ModelAway.
    """
    from blipq.s3.storage import Storage

    settings, options = _settings()
    logging.getLogger("blipq_worker").info("using %s", settings.endpoints)
    Storage(settings).check_configuration()
    require_port(options.health_port, options.health_host)
    fronts = fronts_of(options)
    if fronts:
        hide_keys_of_models()  # before there is a front
        from blipq_worker.supervision.worker import SplitWorker

        return SplitWorker(settings, options, fronts)
    # torch and transformers take seconds to import: wrong settings are reported before.
    with START.part("imports"):
        from transformers.utils import logging as transformers_logging

        from blipq_worker.app import Worker
        from blipq_worker.serving.loader import checker, load_models

    transformers_logging.disable_progress_bar()
    models = load_models(options)
    slots = max(model.static_slots for model in models.values())
    check = checker(options, models)
    forget_model_keys()
    return Worker(settings, options.filling(slots), models, check=check)


def _settings(process: str = "") -> tuple[Settings, WorkerSettings]:
    """The settings, with logging set up by them. process: named in each line.

    Raises InvalidRequest, also where several cells are named and not the one to serve.
    """
    _set_up_logging(process)
    # Root is common in containers, and only JSON is accepted.
    warnings.filterwarnings("ignore", message="You're running the worker with superuser")
    settings = checked(Settings)
    check_one_cell(settings)
    return settings, checked(WorkerSettings).beside(settings)


def _set_up_logging(process: str = "") -> None:
    """The log, and what the log is not enough for. Raises InvalidRequest."""
    set_up_logging(process)
    tracing.start("blipq-worker")
    logging.getLogger("celery.worker.strategy").setLevel("WARNING")  # a line per message received


if __name__ == "__main__":
    sys.exit(main())
