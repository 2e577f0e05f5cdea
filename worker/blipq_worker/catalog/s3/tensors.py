"""Where the tensors of a file of weights are, by its header."""

import json
import math
from typing import Any, NamedTuple

from blipq_worker.catalog.s3.blocks import Blocks, Range
from blipq_worker.catalog.s3.errors import Fault, S3ModelError

#: The format begins with the header's length, and bounds it.
_LENGTH_BYTES, _MOST_BYTES = 8, 100_000_000


class StoredTensor(NamedTuple):
    """A tensor in a file: its type as safetensors names it, its shape, and its bytes."""

    dtype: str
    shape: tuple[int, ...]
    range: Range


def tensors_of(blocks: Blocks, file: str, size: int) -> dict[str, StoredTensor]:
    """The tensors of a file of so many bytes, by name. Raises S3ModelError, S3ModelAway."""
    if size < _LENGTH_BYTES:
        raise S3ModelError(Fault.DAMAGED, f"{file} is too short for a file of weights")
    length = int.from_bytes(_read(blocks, file, 0, _LENGTH_BYTES), "little")
    if length > min(_MOST_BYTES, size - _LENGTH_BYTES):
        raise S3ModelError(Fault.DAMAGED, f"{file} has no header of safetensors")
    begin = _LENGTH_BYTES + length
    try:
        header = json.loads(_read(blocks, file, _LENGTH_BYTES, length))
        header.pop("__metadata__", None)
        found = {name: _tensor(file, begin, each) for name, each in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        message = f"{file} has no header of safetensors: {type(error).__name__}: {error}"
        raise S3ModelError(Fault.DAMAGED, message) from error
    if any(each.range.start + each.range.size > size for each in found.values()):
        raise S3ModelError(Fault.DAMAGED, f"{file} ends before its tensors do")
    return found


def _read(blocks: Blocks, file: str, start: int, size: int) -> bytearray:
    data = bytearray(size)
    blocks.fill(Range(file, start, size), memoryview(data))
    return data


def _tensor(file: str, begin: int, described: Any) -> StoredTensor:
    shape = tuple(int(side) for side in described["shape"])
    start, end = described["data_offsets"]
    if not 0 <= start <= end or any(side < 0 for side in shape):
        raise ValueError(f"{described} is no tensor")
    if (math.prod(shape) == 0) != (start == end):
        raise ValueError(f"{described} has no such size")
    return StoredTensor(described["dtype"], shape, Range(file, begin + start, end - start))
