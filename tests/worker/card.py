"""A GPU that is not here, as code on the CPU or on shapes alone sees it: counted, and failing on
demand.

It watches operations, so it knows what is launched, waited for and copied, and how much time that
takes it does not know.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_iter

#: What PyTorch has one kernel of its own for on a GPU, and takes apart elsewhere.
_ONE_KERNEL = {
    *("linear", "scaled_dot_product_attention", "layer_norm", "rms_norm", "softmax"),
    *("log_softmax", "gelu", "argsort", "sort", "topk"),
}
#: Memory that nothing is written to, and what changes a tensor but not its numbers.
_NO_KERNEL = {
    *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"),
    *("detach_", "squeeze_", "unsqueeze_", "transpose_", "t_", "as_strided_"),
}
#: The host needs a number, or the size of what comes out depends on one.
_WAITS = {
    *("_local_scalar_dense", "nonzero", "masked_select", "unique", "_unique2", "unique_dim"),
    *("equal", "repeat_interleave", "bincount"),
}
#: Python reads numbers of a tensor. ``item`` and ``bool`` come down to an operation of _WAITS.
_READS = {"tolist", "cpu", "numpy", "__array__"}
#: Python makes a tensor of numbers that it has.
_SENDS = {"tensor", "as_tensor", "from_numpy", "asarray"}


def out_of_memory() -> Exception:
    """What PyTorch raises where there is no room."""
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB.")


def illegal_access() -> Exception:
    """What PyTorch raises after a kernel has read where nothing is."""
    return torch.AcceleratorError("CUDA error: an illegal memory access was encountered")


class Card(TorchDispatchMode):
    """While it is entered, all tensors are its own.

    launches: kernels by operation. waits: where the host stops for it, by name. sent: copies of the
    host's numbers to it; it waits for those whose memory nobody thought of pinning. fetched: copies
    to the host. Memory for which Python gave ``pin_memory`` is the host's: reading there is no wait
    by itself. behind: for each such reading, the kernels that were launched since the copy that it
    needs: the host waits for none of these. allocations: tensors that it made. dead: what all that
    is asked of it raises, once it has happened.
    """

    def __init__(self) -> None:
        super().__init__()
        self.launches: Counter[str] = Counter()
        self.waits: list[str] = []
        self.sent = self.fetched = 0
        self.behind: list[int] = []
        self.allocations = 0
        self.dead: Exception | None = None
        self._fails: Callable[[], Exception | None] = lambda: None
        self._dies: Callable[[], Exception | None] = lambda: None
        self._python = _Python(self)
        self._entered = 0
        # The host's memory, and how many kernels were launched before it was last copied to. The
        # tensors stay: others would get their places.
        self._host: dict[int, tuple[torch.Tensor, int]] = {}

    @property
    def launched(self) -> int:
        """Kernels in all."""
        return self.launches.total()

    def run_out_of_memory(self, after: int) -> None:
        """Has one allocation fail, the first one after so many."""
        self._fails = _at(after, out_of_memory)

    def die(self, after: int) -> None:
        """Has a launch break the context, the first one after so many."""
        self._dies = _at(after, illegal_access)

    def replay(self, run: Callable[[], None]) -> None:
        """Runs what was recorded, as a graph: one launch, whatever is in it."""
        self.reached()
        self._launch("graph")
        with torch._C.DisableTorchFunction(), _disable_current_modes():
            run()

    def __enter__(self) -> "Card":
        if not self._entered:
            self._python.__enter__()
        self._entered += 1
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._entered -= 1
        if not self._entered:
            self._python.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        self.reached()
        if name not in _ONE_KERNEL:
            # What Python asks for was seen before it came here.
            with torch._C.DisableTorchFunction(), self:
                made = func.decompose(*args, **kwargs)
            if made is not NotImplemented:
                return made
        if name in _WAITS or _reads_a_mask(name, args) or _finds_outliers(name, args):
            self.waits.append(name)
        made = func(*args, **kwargs)
        given = {_memory(each) for each in _tensors((args, kwargs))}
        fresh = [each for each in _tensors(made) if _memory(each) not in given]
        if fresh:
            self.allocated()
        if name == "copy_" and self.is_host(args[0]):
            self._fetch(*args, **kwargs)
        elif name not in _NO_KERNEL and (fresh or func._schema.is_mutable):
            self._launch(name)
        return made

    def is_host(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor is in the host's memory."""
        return _memory(tensor) in self._host

    def give_host(self, tensor: torch.Tensor) -> None:
        """Counts a tensor as in the host's memory."""
        self._host[_memory(tensor)] = tensor, self.launched

    def read(self, tensor: torch.Tensor) -> None:
        """The host reads what was copied there."""
        self.behind.append(self.launched - self._host[_memory(tensor)][1])

    def _fetch(self, to: torch.Tensor, what: torch.Tensor, non_blocking: bool = False) -> None:
        self.fetched += 1
        self.give_host(to)
        if not non_blocking:
            self.waits.append("copy_")

    def reached(self) -> None:
        """Raises if it is dead."""
        if self.dead is not None:
            raise self.dead

    def allocated(self) -> None:
        """Counts an allocation. Raises OutOfMemoryError if it is the one that is to fail."""
        error = self._fails()
        if error is not None:
            raise error
        self.allocations += 1

    def _launch(self, name: str) -> None:
        self.launches[name] += 1
        self.dead = self._dies()
        self.reached()


class _Python(TorchFunctionMode):
    """What of tensors Python reads and makes without an operation."""

    def __init__(self, card: Card) -> None:
        super().__init__()
        self._card = card

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in _READS:
            self._card.reached()
            if self._card.is_host(args[0]):
                self._card.read(args[0])
            else:
                self._card.waits.append(name)
        made = func(*args, **(kwargs or {}))
        if name == "empty" and "pin_memory" in (kwargs or {}):
            self._card.give_host(made)
        if name in _SENDS and made.numel():
            self._card.sent += 1
            self._card.allocated()
            if "pin_memory" not in (kwargs or {}):
                self._card.waits.append(name)
        return made


def _at(after: int, make: Callable[[], Exception]) -> Callable[[], Exception | None]:
    """An error at the first call after so many, and at no other."""
    left = after

    def fails() -> Exception | None:
        nonlocal left
        left -= 1
        return make() if left == -1 else None

    return fails


def _tensors(values: Any) -> Iterator[torch.Tensor]:
    return (each for each in tree_iter(values) if isinstance(each, torch.Tensor))


def _memory(tensor: torch.Tensor) -> int:
    if tensor.layout != torch.strided:  # packed for a CPU
        return id(tensor)
    return tensor.untyped_storage()._cdata


def _reads_a_mask(name: str, args: Any) -> bool:
    """Whether it takes what a mask names, and so needs to know how much that is.

    To put one number there it does not.
    """
    if name not in ("index", "index_put", "index_put_"):
        return False
    masked = any(each.dtype == torch.bool for each in _tensors(args[1]))
    return masked and (name == "index" or args[2].numel() > 1)


def _finds_outliers(name: str, args: Any) -> bool:
    """Whether bitsandbytes looks for numbers above its threshold, if it has one."""
    return name == "int8_vectorwise_quant" and bool(args[1:] > (0,))
