"""What a front calls images, and what they are.

A front names an image by the digest of its file, which the engine never sees: a front that a
hostile picture has taken over could give any pixels any name, and what is known of one image would
answer for another one, for all fronts. So an image's name in the engine is the digest of its
pixels, taken here, and each front's own names lead there.
"""

import hashlib

#: Of one front, the latest used: some 300 bytes each.
MOST_NAMES = 4096


class Names:
    """The names that one front has given to images, by model."""

    def __init__(self) -> None:
        self._digests: dict[tuple[str, str], str] = {}

    def learned(self, model: str, name: str, pixels: memoryview) -> str:
        """The digest of an image's pixels, which the front calls ``name``."""
        digest = hashlib.sha256(pixels).hexdigest()
        self._put((model, name), digest)
        if len(self._digests) > MOST_NAMES:
            del self._digests[next(iter(self._digests))]
        return digest

    def get(self, model: str, name: str) -> str | None:
        """The digest of the pixels that the front has sent under this name, if it is remembered."""
        digest = self._digests.get((model, name))
        if digest is not None:
            self._put((model, name), digest)
        return digest

    def _put(self, key: tuple[str, str], digest: str) -> None:
        self._digests.pop(key, None)  # the latest used is the last
        self._digests[key] = digest
