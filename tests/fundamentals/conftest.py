"""A picture of the demo model's world, drawn fresh: no model was trained on it."""

import pytest

from blipq_worker.demo import world
from fundamentals.pictures import png


@pytest.fixture(scope="session")
def scene() -> world.Scene:
    """What is in the picture."""
    scenes = map(world.scene, world.DEMO_SEEDS)
    return next(scene for scene in scenes if len(scene.shapes) == 2)


@pytest.fixture(scope="session")
def picture(scene: world.Scene) -> bytes:
    """The picture."""
    return png(scene)
