"""Remembers what the model made of images, so that it looks at each of them once."""

import threading
from collections import OrderedDict
from collections.abc import Collection
from weakref import WeakValueDictionary

import torch


class FeatureCache:
    """Tensors by (image, feature): the least recently used go when ``max_bytes`` are full.

    They lie in host memory: a GPU's own is for weights and keys, and the 100 KB to 2 MB of an image
    cross its bus in less time than one decode step takes. An image is named by the SHA-256 of its
    file, a feature by all it depends on: preprocessing, weights and precision. A tensor that has no
    place is still found while an item holds it: items that are there together share a pass whatever
    ``max_bytes`` is. Thread-safe.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.bytes = 0
        # The model's thread puts features; where jobs run in its process, their threads look up.
        self._lock = threading.Lock()
        self._tensors: OrderedDict[tuple[str, str], torch.Tensor] = OrderedDict()
        self._held: WeakValueDictionary[tuple[str, str], torch.Tensor] = WeakValueDictionary()

    def __len__(self) -> int:
        return len(self._tensors)

    def get(self, image: str, feature: str) -> torch.Tensor | None:
        """What is known; the caller must not change it."""
        with self._lock:
            tensor = self._tensors.get((image, feature))
            if tensor is None:
                return self._held.get((image, feature))
            self._tensors.move_to_end((image, feature))
            return tensor

    def forget(self, images: Collection[str]) -> None:
        """Drops all that is known of images; what an item holds is the item's."""
        with self._lock:
            for key in [key for key in self._tensors if key[0] in images]:
                self.bytes -= self._tensors.pop(key).nbytes
            for key in [key for key in self._held if key[0] in images]:
                self._held.pop(key, None)  # its item may have ended meanwhile

    def put(self, image: str, feature: str, tensor: torch.Tensor) -> None:
        """Remembers a tensor in host memory that shares its own with no other."""
        with self._lock:
            self._held[image, feature] = tensor
            if tensor.nbytes > self.max_bytes:
                return
            known = self._tensors.pop((image, feature), None)
            self.bytes += tensor.nbytes - (0 if known is None else known.nbytes)
            self._tensors[image, feature] = tensor
            while self.bytes > self.max_bytes:
                _, oldest = self._tensors.popitem(last=False)
                self.bytes -= oldest.nbytes
