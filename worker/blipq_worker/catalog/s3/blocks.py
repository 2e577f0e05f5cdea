"""Ranges of a checkpoint's weights, read by blocks: several at a time, and ahead of their use."""

import threading
from collections import Counter, OrderedDict, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

from blipq_worker.catalog.s3.errors import S3ModelAway
from blipq_worker.catalog.s3.manifest import Manifest
from blipq_worker.catalog.s3.objects import Block, Objects

CONNECTIONS = 16
#: Blocks that are read or wait to be used, and those that are kept for the next range with a part
#: of them: together the memory that reading takes, beside the ranges themselves.
AHEAD, KEPT = 16, 4
#: After so many uses of others, a block that was read ahead counts as unwanted.
_UNWANTED = 8 * AHEAD
#: Longer than a block can take, with all its tries and those before it.
_LONGEST_S = 900.0


class Range(NamedTuple):
    """Bytes of a file."""

    file: str
    start: int
    size: int


class _Piece(NamedTuple):
    """What a block has of a range: ``size`` bytes from its ``start`` on, for the range's ``at``."""

    block: Block
    start: int
    size: int
    at: int


class _Read(NamedTuple):
    """A block that is being read. begun: how many uses of blocks there had been."""

    data: Future[bytearray]
    begun: int


class Blocks:
    """Reads ranges of files by blocks. Thread-safe."""

    def __init__(self, objects: Objects, manifest: Manifest) -> None:
        self._objects, self._manifest = objects, manifest
        self._pool = ThreadPoolExecutor(CONNECTIONS, thread_name_prefix="blipq-weights")
        self._lock = threading.Lock()
        #: Blocks that are being read, or wait for their first use; the oldest first.
        self._held: dict[Block, _Read] = {}
        #: Blocks that were used, and will be by another range; the longest unused first.
        self._kept: OrderedDict[Block, _Read] = OrderedDict()
        #: How many ranges still need a block, as far as is known.
        self._uses: Counter[Block] = Counter()
        self._used_so_far = 0
        #: What is read next while there is room.
        self._coming: deque[Block] = deque()

    def plan(self, ranges: Iterable[Range]) -> None:
        """Takes the ranges that will be requested, in their order: they are read ahead.

        Another order, and ranges that are not among them, cost time alone.
        """
        planned = [piece.block for each in ranges for piece in self._pieces(each)]
        with self._lock:
            self._uses.update(planned)
            self._coming.extend(dict.fromkeys(planned))

    def fill(self, wanted: Range, view: memoryview) -> None:
        """Copies a range into a view of its size. Raises S3ModelError, S3ModelAway."""
        pieces = list(self._pieces(wanted))
        with self._lock:
            for piece in pieces:
                self._uses[piece.block] = max(1, self._uses[piece.block])
            # What is wanted now goes before what may be wanted later.
            self._coming.extendleft(piece.block for piece in reversed(pieces[1:]))
        for piece in pieces:
            data = memoryview(self._wanted(piece.block))
            view[piece.at : piece.at + piece.size] = data[piece.start : piece.start + piece.size]
            self._used(piece.block)

    def close(self) -> None:
        """Stops reading, and waits until it has stopped."""
        self._objects.close()
        self._pool.shutdown(cancel_futures=True)

    def _pieces(self, wanted: Range) -> Iterator[_Piece]:
        done = 0
        while done < wanted.size:
            number, start = divmod(wanted.start + done, self._manifest.block_bytes)
            size = min(self._manifest.block_bytes - start, wanted.size - done)
            yield _Piece(Block(wanted.file, number), start, size, done)
            done += size

    def _wanted(self, block: Block) -> bytearray:
        with self._lock:
            # Begun also where no more may be held: a thread that waits here frees no other block.
            read = self._held.get(block) or self._kept.get(block) or self._begin(block)
            self._read_ahead()
        try:
            return read.data.result(_LONGEST_S)
        except TimeoutError:
            raise S3ModelAway(f"{self._objects.place.uri(block.file)}: no answer") from None

    def _used(self, block: Block) -> None:
        """Lets a block go, or keeps it for the next range that needs it."""
        with self._lock:
            self._used_so_far += 1
            self._uses[block] -= 1
            read = self._held.pop(block, None) or self._kept.pop(block, None)
            if read is not None and self._uses[block] > 0:
                self._kept[block] = read
            if len(self._kept) > KEPT:  # it is read once more when its time comes
                self._kept.popitem(last=False)
            self._read_ahead()

    # -- under the lock --

    def _read_ahead(self) -> None:
        """Begins to read what comes next, as far as there is room."""
        # Some weights are taken by no part of the model.
        while self._held and self._is_unwanted(oldest := next(iter(self._held))):
            del self._held[oldest]
        while self._coming and len(self._held) < AHEAD:
            block = self._coming.popleft()
            if block not in self._held and block not in self._kept and self._uses[block] > 0:
                self._begin(block)

    def _is_unwanted(self, block: Block) -> bool:
        return self._used_so_far - self._held[block].begun > _UNWANTED

    def _begin(self, block: Block) -> _Read:
        data = self._pool.submit(self._objects.block, block, self._manifest)
        self._held[block] = read = _Read(data, self._used_so_far)
        return read
