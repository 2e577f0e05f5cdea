"""When a worker says that it waits for the decoding of images, not for its model."""

import pytest

from blipq_worker.images.bottleneck import LOOKS, Bottleneck
from blipq_worker.inference.requests import Load

SLOTS = 32
HUNGRY = Load(waiting=0, running=SLOTS - 1)


class Sides:
    """Images that wait to be decoded, and what the engine has to do."""

    def __init__(self) -> None:
        self.images = 0
        self.work: Load | None = HUNGRY
        self.bottleneck = Bottleneck(lambda: self.images, lambda: self.work, SLOTS)

    def holds_after(self, looks: int, images: int = 1, work: Load | None = HUNGRY) -> bool:
        self.images, self.work = images, work
        for _ in range(looks):
            self.bottleneck.look()
        return self.bottleneck.holds


def test_decoding_is_the_bound_where_images_wait_for_it_and_the_engine_for_images() -> None:
    sides = Sides()
    assert not sides.holds_after(LOOKS - 1), "a burst is no bound"
    assert sides.holds_after(1)


@pytest.mark.parametrize(
    ("images", "work"),
    [
        (0, HUNGRY),
        (1, Load(waiting=1, running=SLOTS - 1)),
        (1, Load(waiting=0, running=SLOTS)),
        (1, None),
    ],
    ids=["no image waits", "items wait", "all slots are taken", "no engine"],
)
def test_decoding_is_not_the_bound_where_one_of_both_does_not_wait(
    images: int, work: Load | None
) -> None:
    assert not Sides().holds_after(LOOKS, images, work)


def test_a_moment_does_not_end_it_and_its_end_does() -> None:
    sides = Sides()
    sides.holds_after(LOOKS)
    assert sides.holds_after(1, images=0)
    assert not sides.holds_after(LOOKS // 2, images=0)
