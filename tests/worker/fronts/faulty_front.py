"""A front as it ships, whose decoder hangs on pictures of one size."""

import sys
import threading
from typing import Any

from blipq_worker.__main__ import main
from blipq_worker.images import loader

HANGING_SIZE = (13, 13)


def _hang_on_one_size() -> None:
    pixels_of = loader.pixels_of

    def made(image: Any, recipes: Any) -> Any:
        if image.size == HANGING_SIZE:
            threading.Event().wait()
        return pixels_of(image, recipes)

    loader.pixels_of = made


if __name__ == "__main__":
    _hang_on_one_size()
    sys.exit(main())
