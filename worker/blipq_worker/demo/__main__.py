"""``python -m blipq_worker.demo``: what ``blipq demo`` runs."""

import sys
from collections.abc import Sequence

from blipq_worker.demo.options import parse
from blipq_worker.demo.signals import Interrupted, Signals


def main(arguments: Sequence[str] | None = None) -> int:
    """Gives the demo; the exit code."""
    options, signals = parse(arguments), Signals()
    try:
        signals.watch()
        # Only now, because it takes a second in which Ctrl-C may come.
        from blipq_worker.demo.run import give

        return give(options, signals)
    except Interrupted as interruption:
        print("stopped", file=sys.stderr)
        return 128 + interruption.number


if __name__ == "__main__":
    sys.exit(main())
