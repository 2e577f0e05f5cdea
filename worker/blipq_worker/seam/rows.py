"""Where pixels lie from their arrival until their item is done."""

from typing import Protocol

#: Some 3,500 images of 224 x 224 pixels.
MOST_BYTES = 512 * 2**20


class Rows(Protocol):
    """Memory for pixels, lent image by image. Of one thread; a bound is its duty."""

    def lend(self, size: int) -> memoryview | None:
        """Room for exactly so many bytes; None if there is none now."""

    def take_back(self, row: memoryview) -> None:
        """The room is free again."""


class HeapRows:
    """Each image in memory of its own, ``most_bytes`` at once.

    Nothing is used again: whoever reads an image too long reads that image and no other one.
    """

    def __init__(self, most_bytes: int = MOST_BYTES) -> None:
        self._left = most_bytes

    def lend(self, size: int) -> memoryview | None:
        """Room for exactly so many bytes; None if there is none now."""
        if size > self._left:
            return None
        self._left -= size
        return memoryview(bytearray(size))

    def take_back(self, row: memoryview) -> None:
        """The room is free again."""
        self._left += row.nbytes
