"""Retrains the demo models from nothing: `python -m tools.demo_model.train`."""

import argparse
import logging

from tools.demo_model import itm, opt, t5, vision
from tools.demo_model.data import Pictures, pictures

from blipq_worker.demo import world

LOG = logging.getLogger(__name__)
TRAINING_SCENES = 60_000
VALIDATION_SCENES = 2_000


def training_pictures() -> Pictures:
    """Pictures of the first training seeds."""
    return pictures(world.TRAINING_SEEDS[:TRAINING_SCENES])


def validation_pictures() -> Pictures:
    """Pictures of the first validation seeds."""
    return pictures(world.VALIDATION_SEEDS[:VALIDATION_SCENES])


def main() -> None:
    """Run all phases in order, or only those that are named."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("phases", nargs="*", default=[*PHASES], metavar="|".join(PHASES))
    phases = arguments.parse_args().phases
    training, validation = training_pictures(), validation_pictures()
    for phase in phases:
        LOG.info("phase %s", phase)
        PHASES[phase](training, validation)


def _train_vision(training: Pictures, validation: Pictures) -> None:
    vision.train(training, validation)


def _train_opt(training: Pictures, validation: Pictures) -> None:
    opt.train(vision.load(), training, validation)


def _train_itm(training: Pictures, validation: Pictures) -> None:
    itm.train(vision.load(), training, validation)


def _train_t5(training: Pictures, validation: Pictures) -> None:
    t5.train(vision.load(), training, validation)


PHASES = {"vision": _train_vision, "opt": _train_opt, "itm": _train_itm, "t5": _train_t5}


if __name__ == "__main__":
    main()
