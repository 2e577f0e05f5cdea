"""What a process keeps from others of the same user: the keys that models are read with."""

import ctypes
import logging
import os
import sys

from blipq_worker.catalog.s3.keys import PREFIX

log = logging.getLogger(__name__)

#: Credentials for the hub, which weights are read with. Nothing is read from there later.
HUB_TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH")

_PR_SET_DUMPABLE = 4


def is_of_models(name: str) -> bool:
    """Whether a variable is of those that reach models, and nothing else."""
    return name.upper().startswith(PREFIX) or name in HUB_TOKENS


def hide_keys_of_models() -> None:
    """Where the environment has keys of models, closes this process to others of its user.

    Fronts, which decode what strangers send, run as the same user. /proc/PID/environ would show
    them the environment that a process was started with, whatever it has deleted since, and
    /proc/PID/mem the rest. Now root alone reads these, and no core is dumped; stat and statm, from
    which metrics and supervisors read, stay open. A fork inherits this, and exec ends it: a child
    program must not have the keys. Linux alone.
    """
    if sys.platform != "linux" or not any(is_of_models(name) for name in os.environ):
        return
    if ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0) != 0:
        log.warning("other processes of this user can read the keys of models: prctl is refused")
