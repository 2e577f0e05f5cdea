"""How the C library keeps freed memory."""

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h
_LARGE = 8 * 2**20
#: Freed memory that a thread keeps for its next blocks: what the layers of a pass take turns in.
_KEPT = 8 * _LARGE


def give_large_blocks_back() -> None:
    """Makes glibc return each large block to the system when it is freed.

    Left alone it raises its threshold to the largest block it saw, and keeps the pictures of every
    thread that ever decoded one: 2 GB after sixteen images of 49 megapixels. So it does with layers
    that were quantized: 1 GB for a model of 2.7 B parameters in nf4.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGE)
        mallopt(_M_TRIM_THRESHOLD, _KEPT)
