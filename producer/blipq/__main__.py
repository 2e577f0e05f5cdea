"""``python -m blipq`` is the ``blipq`` command."""

from blipq.cli import main

main()
