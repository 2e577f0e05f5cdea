"""Retrains the demo models from nothing: `python -m tools.demo_model.train`."""

import argparse
import logging

from tools.demo_model import itm, opt, t5, vision
from tools.demo_model.data import pictures

from blipq_worker.demo import world

LOG = logging.getLogger(__name__)
TRAINING_SCENES = 60_000
VALIDATION_SCENES = 2_000
PHASES = {"vision": vision, "opt": opt, "itm": itm, "t5": t5}


def main() -> None:
    """Run all phases in order, or only those that are named."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("phases", nargs="*", default=[*PHASES], metavar="|".join(PHASES))
    parser.add_argument("--fraction", type=float, default=1.0, help="of all scenes and steps")
    chosen = parser.parse_args()
    training = pictures(world.TRAINING_SEEDS[: int(chosen.fraction * TRAINING_SCENES)])
    validation = pictures(world.VALIDATION_SEEDS[:VALIDATION_SCENES])
    for name in chosen.phases:
        LOG.info("phase %s", name)
        phase = PHASES[name]
        steps = int(chosen.fraction * phase.STEPS)
        if phase is vision:
            vision.train(training, validation, steps)
        else:
            phase.train(vision.load(), training, validation, steps)


if __name__ == "__main__":
    main()
