"""What a checkpoint in S3 consists of: its files with their sizes and digests.

Weights are read in ranges, by several connections, and in another order than they are stored in. So
that no byte is used before it is checked, a file has a digest for each block beside that of the
whole, which is the revision of a local folder with the same weights.
"""

import hashlib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from blipq_worker.catalog.models import QFORMER_TOKENIZER

MANIFEST = "blipq-manifest.json"
#: What a push is about, in place of the manifest as long as it has not ended.
DRAFT = "blipq-push.json"
#: Bytes of a block: large enough that S3's time to answer counts little.
BLOCK_BYTES = 8 * 2**20
#: Beside the weights a checkpoint has configurations, tokenizers and goldens: so large at most.
SMALL_BYTES = 64 * 2**20
WEIGHTS = ".safetensors"

_Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
#: Files are written to a folder under these names, a Q-Former's tokenizer to one in it.
_NAME = re.compile(rf"(?:{QFORMER_TOKENIZER}/)?[A-Za-z0-9_][A-Za-z0-9._-]{{0,254}}")


class StoredFile(BaseModel):
    """A file's bytes, their SHA-256, and that of each block, in hex; the last may be shorter."""

    model_config = ConfigDict(frozen=True)

    bytes: int = Field(ge=0)
    sha256: _Digest
    blocks: tuple[_Digest, ...]


class Manifest(BaseModel):
    """The files of a checkpoint by name."""

    model_config = ConfigDict(frozen=True)

    format: Literal[1] = 1
    block_bytes: int = Field(default=BLOCK_BYTES, ge=2**10, le=2**26)
    files: Mapping[str, StoredFile]

    @model_validator(mode="after")
    def _is_consistent(self) -> "Manifest":
        if not self.weights:
            raise ValueError("it names no weights")
        for name, file in self.files.items():
            if _NAME.fullmatch(name) is None:
                raise ValueError(f"{name!r} is no name of a file")
            if len(file.blocks) != -(-file.bytes // self.block_bytes):
                raise ValueError(f"{name} has {file.bytes} bytes in {len(file.blocks)} blocks")
            if not name.endswith(WEIGHTS) and file.bytes > SMALL_BYTES:
                raise ValueError(f"{name} is larger than {SMALL_BYTES:,} bytes")
        return self

    @property
    def weights(self) -> dict[str, StoredFile]:
        """The files of weights."""
        return {name: file for name, file in self.files.items() if name.endswith(WEIGHTS)}

    @property
    def revision(self) -> str:
        """The SHA-256 of the weights, as of a local folder."""
        weights = self.weights
        return revision_of(bytes.fromhex(weights[name].sha256) for name in sorted(weights))

    def written(self) -> bytes:
        """The manifest as an object's bytes: equal manifests have equal ones."""
        files = {name: self.files[name] for name in sorted(self.files)}
        return self.model_copy(update={"files": files}).model_dump_json(indent=1).encode()


def revision_of(digests: Iterable[bytes]) -> str:
    """The digest of a single file, or of the digests of several in the order of their names."""
    first, *others = digests
    return hashlib.sha256(b"".join((first, *others))).hexdigest() if others else first.hex()


def stored_file(path: Path, block_bytes: int = BLOCK_BYTES) -> StoredFile:
    """A file on disk as a manifest describes it. Raises OSError."""
    whole, blocks, size = hashlib.sha256(), [], 0
    with path.open("rb") as file:
        while block := file.read(block_bytes):
            whole.update(block)
            blocks.append(hashlib.sha256(block).hexdigest())
            size += len(block)
    return StoredFile(bytes=size, sha256=whole.hexdigest(), blocks=tuple(blocks))
