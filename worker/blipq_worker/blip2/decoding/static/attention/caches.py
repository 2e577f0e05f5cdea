"""Keys and values of all slots, reserved once."""

from collections.abc import Sequence

import torch

#: Most that is copied at once while prefilled sequences are put into their slots.
_COPY_BYTES = 256 * 2**20


class KeysAndValues:
    """Of one kind of attention in all layers: (layers, 2, slots, heads, columns, head size).

    One tensor: memory is taken for all layers or for none.
    """

    def __init__(
        self,
        layers: int,
        slots: int,
        heads: int,
        columns: int,
        size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (layers, 2, slots, heads, columns, size)
        self._all = torch.zeros(shape, dtype=dtype, device=device)
        #: Each layer's: (2, slots, heads, columns, head size).
        self.layers = list(self._all.unbind(0))

    @staticmethod
    def bytes_of(layers: int, heads: int, columns: int, size: int, dtype: torch.dtype) -> int:
        """Bytes of one slot."""
        return layers * 2 * heads * columns * size * dtype.itemsize

    @property
    def bytes(self) -> int:
        """Bytes of all slots."""
        return self._all.nbytes

    def put(
        self,
        at: torch.Tensor,
        filled: Sequence[tuple[torch.Tensor, torch.Tensor]],
        *,
        clear: bool,
    ) -> None:
        """Puts keys and values of each layer, (n, heads, width, head size), into slots.

        at: (n, m), the m slots of each. clear: also what is left there of earlier sequences. A mask
        hides it, but what is hidden is still multiplied by nothing, which numbers that are not
        finite survive.
        """
        width = filled[0][0].shape[2]
        together = max(1, _COPY_BYTES // (2 * filled[0][0].nbytes))
        for start in range(0, len(filled), together):
            some = filled[start : start + together]
            both = torch.stack([part for pair in some for part in pair])
            buffer = self._all[start : start + len(some)]
            buffer[:, :, at, :, :width] = both.view(len(some), 2, len(at), 1, *both.shape[2:])
            if clear:
                buffer[..., width:, :].index_fill_(2, at.flatten(), 0)

    def clear(self, at: torch.Tensor) -> None:
        """Clears slots, of any shape."""
        self._all.index_fill_(2, at.flatten(), 0)
