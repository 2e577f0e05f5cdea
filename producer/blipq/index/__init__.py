"""Search indexes: read, written and filled. Needs what ``blipq[search]`` installs."""

import importlib.util

from blipq.client.forgetting import Unindex
from blipq.settings import Settings

NEEDED = ("lancedb", "numpy")


def unindex_of(settings: Settings) -> Unindex | None:
    """Removes images from search indexes, where the parts for that are installed."""
    if not all(map(importlib.util.find_spec, NEEDED)):
        return None
    from blipq.index.store import Indexes

    return Indexes(settings).remove
