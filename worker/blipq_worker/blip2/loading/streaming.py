"""Weights that are read from S3 as transformers requests them, tensor by tensor."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from blipq_worker.catalog.s3.blocks import Blocks
from blipq_worker.catalog.s3.errors import Fault, S3ModelError
from blipq_worker.catalog.s3.pushed import Pushed
from blipq_worker.catalog.s3.tensors import StoredTensor

#: Types as safetensors names them.
_TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class StreamedTensor:
    """A tensor in S3, in the place of one of safetensors' slices: an index reads it whole."""

    def __init__(self, blocks: Blocks, name: str, stored: StoredTensor) -> None:
        self._blocks, self._stored = blocks, stored
        if stored.dtype not in _TYPES:
            raise S3ModelError(Fault.DAMAGED, f"{name} is of the unknown type {stored.dtype}")
        self._dtype = _TYPES[stored.dtype]
        if torch.Size(stored.shape).numel() * self._dtype.itemsize != stored.range.size:
            raise S3ModelError(Fault.DAMAGED, f"{name} has not the bytes of {stored.shape}")

    def get_dtype(self) -> str:
        """Its type as safetensors names it."""
        return self._stored.dtype

    def get_shape(self) -> list[int]:
        """Its shape."""
        return list(self._stored.shape)

    def __getitem__(self, index: Any) -> torch.Tensor:
        """The tensor at an index, on any thread. Raises S3ModelError, S3ModelAway."""
        data = torch.empty(self._stored.range.size, dtype=torch.uint8)
        self._blocks.fill(self._stored.range, data.numpy().data)
        return data.view(self._dtype).view(self._stored.shape)[index]


@contextmanager
def streamed_weights(
    pushed: Pushed, files: Mapping[str, set[str] | None]
) -> Iterator[dict[str, StreamedTensor]]:
    """The checkpoint's tensors by name, each read on request and not kept."""
    with pushed.reading() as blocks:
        stored = pushed.tensors(blocks, files)
        weights = {name: StreamedTensor(blocks, name, stored[name]) for name in stored}
        # Transformers takes them by their names, numbers in order.
        blocks.plan(stored[name].range for name in sorted(stored, key=_natural))
        yield weights


def _natural(name: str) -> list[tuple[int, int, str]]:
    """Sorts the tenth layer behind the second."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split(".")]
