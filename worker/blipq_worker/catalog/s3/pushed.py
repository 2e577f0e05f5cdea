"""A checkpoint in S3 that is being loaded: its small files are here, its weights are not."""

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from blipq_worker.catalog.s3.blocks import CONNECTIONS, Blocks
from blipq_worker.catalog.s3.errors import Fault, S3ModelError
from blipq_worker.catalog.s3.manifest import WEIGHTS
from blipq_worker.catalog.s3.objects import Objects
from blipq_worker.catalog.s3.places import place_of
from blipq_worker.catalog.s3.tensors import StoredTensor, tensors_of


class Pushed:
    """A checkpoint as it was pushed.

    folder: this user's alone, with all files but the weights; ``close`` removes it. Raises
    ModelError, and S3ModelAway.
    """

    def __init__(self, checkpoint: str) -> None:
        self._objects = Objects(place_of(checkpoint), connections=CONNECTIONS)
        self.manifest = self._objects.manifest()
        self._objects.check_weights(self.manifest)
        self._temporary = tempfile.TemporaryDirectory(prefix="blipq-checkpoint-")
        self.folder = Path(self._temporary.name)
        try:
            self._fetch_small_files()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Removes the folder."""
        self._temporary.cleanup()

    @contextmanager
    def reading(self) -> Iterator[Blocks]:
        """What reads its weights, as long as it is open."""
        blocks = Blocks(self._objects, self.manifest)
        try:
            yield blocks
        finally:
            blocks.close()

    def tensors(
        self, blocks: Blocks, files: Mapping[str, set[str] | None]
    ) -> dict[str, StoredTensor]:
        """The tensors that are to be taken from these files (None: all of them), by name."""
        found: dict[str, StoredTensor] = {}
        for file, names in files.items():
            stored = tensors_of(blocks, file, self.manifest.files[file].bytes)
            if lacks := sorted((names or set()) - stored.keys()):
                uri = self._objects.place.uri(file)
                raise S3ModelError(Fault.DAMAGED, f"{uri} lacks {lacks[0]}, which its index names")
            found |= {name: stored[name] for name in names or stored}
        return found

    def _fetch_small_files(self) -> None:
        for name in self.manifest.files:
            if not name.endswith(WEIGHTS):
                path = self.folder / name
                path.parent.mkdir(exist_ok=True)
                path.write_bytes(self._objects.small(name, self.manifest))
