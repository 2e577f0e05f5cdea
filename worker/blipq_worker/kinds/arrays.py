"""Features as numbers."""

from typing import Any

import numpy as np

from blipq_worker.inference.requests import Array

Numbers = np.ndarray[Any, np.dtype[np.float32]]


def numbers(array: Array) -> Numbers:
    """The numbers of an array, which cannot be changed."""
    return np.frombuffer(array.data, dtype="<f4").reshape(array.shape)
