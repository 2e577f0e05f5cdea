"""How a person can start the ``blipq`` command again, for hints that name one."""

import shlex
import shutil
import sys
from pathlib import Path


def blipq(arguments: str) -> str:
    """A ``blipq`` command to type: by the path it was started by where PATH does not lead to it.

    In any other program it is ``blipq``.
    """
    started = Path(sys.argv[0])
    found = shutil.which("blipq")
    if started.name != "blipq" or (found and Path(found).resolve() == started.resolve()):
        return f"blipq {arguments}"
    # Absolute: it may be typed in another folder, and ./blipq must not become blipq.
    return f"{shlex.quote(str(started.absolute()))} {arguments}"
