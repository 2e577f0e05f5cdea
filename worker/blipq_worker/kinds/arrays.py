"""Features as numbers."""

from base64 import b64encode
from typing import Any

import numpy as np

from blipq import contract
from blipq_worker.inference.requests import Array

Numbers = np.ndarray[Any, np.dtype[np.float32]]


def numbers(array: Array) -> Numbers:
    """The numbers of an array, which cannot be changed."""
    return np.frombuffer(array.data, dtype="<f4").reshape(array.shape)


def stored(values: Numbers, dtype: contract.EmbedDtype) -> contract.Array:
    """Numbers as results hold them."""
    data = np.asarray(values, dtype=np.dtype(dtype).newbyteorder("<")).tobytes()
    return contract.Array(shape=values.shape, dtype=dtype, data=b64encode(data).decode())
