"""A fleet of up to 1,000 GPUs, simulated from measured costs: ``python -m benchmarks.fleet``.

First three runs of real workers here are measured, which the simulation must foretell: one worker,
two, and two of which one is killed. That takes two minutes. ``--simulate`` leaves them out, and
takes the last ones.
"""

import argparse
import sys
from typing import Any

from benchmarks import page, results
from benchmarks.fleet import measured, scenarios
from benchmarks.fleet.costs import of_a_gpu, of_the_queue

#: How far the simulation may be off, as a share of what was measured.
MOST_OFF = 0.1


def main() -> int:
    """Measures and simulates, and writes the page's tables; 1 if the simulation is off."""
    parser = argparse.ArgumentParser("python -m benchmarks.fleet", description=__doc__)
    parser.add_argument("--simulate", action="store_true", help="measure nothing")
    simulate = parser.parse_args().simulate
    kept = results.load("fleet")
    if simulate and kept is None:
        parser.error("nothing was measured yet: leave --simulate out")

    def found() -> dict[str, Any]:
        real = kept["found"]["real"] if simulate and kept is not None else measured.measured()
        costs = of_the_queue(real["costs"]["idle_us"])
        return {"real": real, "simulated": scenarios.simulated(costs, of_a_gpu())}

    runs = results.measure("fleet", found, command="python -m benchmarks.fleet")["real"]["runs"]
    page.write()
    worst = {name: measured.off(run) for name, run in runs.items()}
    for name, share in worst.items():
        print(f"{name}: the simulation is off by {share:.1%} at the most")
    return int(max(worst.values()) > MOST_OFF)


if __name__ == "__main__":
    sys.exit(main())
