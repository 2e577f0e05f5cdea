"""``python -m blipq_worker``: one worker process (``blipq worker`` starts it)."""

import logging
import os
import sys
import warnings

from pydantic import ValidationError

from blipq.redaction import log_to_stderr
from blipq.requests import explain
from blipq.settings import Settings
from blipq_worker.settings import WorkerSettings

#: A model cannot be loaded, or a setting is wrong: starting again would not help.
EXIT_MODEL = 78


def main() -> int:
    """Loads the models, then works until told to stop."""
    level = os.environ.get("BLIPQ_LOG_LEVEL", "INFO")
    log_to_stderr(level, "%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("celery.worker.strategy").setLevel("WARNING")  # a line per message received
    # Root is common in containers, and only JSON is accepted.
    warnings.filterwarnings("ignore", message="You're running the worker with superuser")
    try:
        settings, options = Settings(), WorkerSettings()
    except ValidationError as error:
        print(f"blipq worker: {explain(error)}", file=sys.stderr)
        return EXIT_MODEL
    logging.getLogger("blipq_worker").info("using %s", settings.endpoints)
    # torch and transformers take seconds to import: wrong settings are told before.
    from transformers.utils import logging as transformers_logging

    from blipq_worker.app import Worker
    from blipq_worker.load import load_models
    from blipq_worker.models import ModelError

    transformers_logging.disable_progress_bar()
    try:
        models = load_models(options)
    except ModelError as error:
        print(f"blipq worker: {error}", file=sys.stderr)
        return EXIT_MODEL
    return Worker(settings, options, models).run()


if __name__ == "__main__":
    sys.exit(main())
