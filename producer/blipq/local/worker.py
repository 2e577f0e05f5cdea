"""The worker is a distribution of its own: whether it is here, and when none is started again."""

import importlib.util

NO_WORKER = (
    "no worker here: install the wheel of blipq-worker, which is on no package index, or run pip "
    "install '.[worker,local]' in a clone of blipq"
)

#: A worker's model cannot be loaded, or answers nonsense: starting it again would not help.
EXIT_MODEL = 78


def has_worker() -> bool:
    """Whether the worker and torch are there: a clone's root installs its code without torch."""
    return all(importlib.util.find_spec(name) for name in ("blipq_worker", "torch"))
