"""Finds a BLIP-2 checkpoint and reads what it is, before any weight is loaded."""

import hashlib
import json
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from blipq.errors import BlipqError
from blipq.program import blipq
from blipq_worker.blip2.loading.configs import is_instructed, is_served, read_config
from blipq_worker.blip2.loading.oddities import oddities
from blipq_worker.catalog.models import (
    COCO_PROMPT,
    COCO_SIDE,
    INSTRUCTION,
    VARIANTS,
    ModelError,
    one_line,
)
from blipq_worker.catalog.s3.manifest import revision_of
from blipq_worker.catalog.s3.places import is_in_s3
from blipq_worker.catalog.s3.pushed import Pushed
from blipq_worker.catalog.weights import (
    expanded,
    is_lfs_pointer,
    stray_weights,
    told_of_file,
    weight_files,
)
from blipq_worker.inference.requests import Family

log = logging.getLogger(__name__)

#: What transformers reads beside the weights: each is JSON where it is there.
_JSON = (
    *("config.json", "generation_config.json", "processor_config.json"),
    *("preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"),
    *("special_tokens_map.json", "added_tokens.json", "vocab.json"),
)
_DESCRIPTION = ["*.json", "*.txt", "*.model"]
_NEEDED = [*_DESCRIPTION, "*.safetensors"]

#: Rotary positions that do not depend on the length of a text.
_ROTATIONS = ("default", "linear", "llama3", "yarn")


class CheckpointError(BlipqError):
    """A checkpoint is missing, incomplete or of the wrong kind; one line has the remedy."""

    def __init__(self, text: str) -> None:
        super().__init__(one_line(text))


class CheckpointMissing(CheckpointError):
    """A checkpoint is neither here nor on the hub; ``what`` is the message without advice."""

    def __init__(self, what: str, advice: str) -> None:
        super().__init__(f"{what}. {advice}")
        self.what = what


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint in a local folder, or with its weights in S3 and the rest in a private folder.

    name: as it was requested. revision: the hub's commit, or the SHA-256 of the weights (of a
    single file: that file's own; of several: of their digests in the order of their names).
    default_prompt: what LAVIS puts before a caption. instructed: see ``ModelInfo``. weights: the
    files that hold them, and which tensors of each (None: all of them). pushed: what reads those in
    S3; ``close`` removes the private folder.
    """

    name: str
    folder: Path
    revision: str
    config: Any
    family: Family
    image_size: int
    num_query_tokens: int
    default_prompt: str
    instructed: bool
    weights: dict[Path, set[str] | None]
    pushed: Pushed | None = None

    def close(self) -> None:
        """Once it is loaded, tokenizer and processor too."""
        if self.pushed is not None:
            self.pushed.close()


@dataclass(frozen=True, slots=True)
class Description:
    """What a checkpoint is, without its weights; see ``Checkpoint``."""

    folder: Path
    config: Any
    family: Family


def describe_checkpoint(name: str) -> Description:
    """The same checkpoint as ``open_checkpoint`` opens; weights are not fetched.

    Raises CheckpointError.
    """
    folder = expanded(name)
    if not folder.is_dir():
        folder = _download(name, _DESCRIPTION)
    config = _read_config(name, folder)
    return Description(folder, config, _family(name, config))


def open_checkpoint(name: str) -> Checkpoint:
    """The checkpoint in the local folder ``name``, with that hub id (``id@revision``), or in S3.

    Whoever opens it closes it. Raises CheckpointError; for one in S3 ModelError and S3ModelAway,
    too.
    """
    if is_in_s3(name):
        return _open_pushed(name)
    folder = expanded(name)
    local = folder.is_dir()
    if not local:
        folder = _download(name, _NEEDED)
    weights = _weights(name, folder)
    return _checkpoint(name, folder, weights, _digest(weights) if local else folder.name)


def _open_pushed(name: str) -> Checkpoint:
    pushed = Pushed(name)
    try:
        weights = weight_files(pushed.folder, pushed.manifest.files)
        return _checkpoint(name, pushed.folder, weights, pushed.manifest.revision, pushed)
    except BaseException:
        pushed.close()
        raise


def _checkpoint(
    name: str,
    folder: Path,
    weights: dict[Path, set[str] | None],
    revision: str,
    pushed: Pushed | None = None,
) -> Checkpoint:
    config = _read_config(name, folder)
    family, image_size = _family(name, config), _side(config.vision_config.image_size)
    for oddity in oddities(config):
        log.warning("checkpoint %r: %s", name, oddity)
    return Checkpoint(
        name=name,
        folder=folder,
        revision=revision,
        config=config,
        family=family,
        image_size=image_size,
        num_query_tokens=config.num_query_tokens,
        default_prompt=_default_prompt(name, image_size, is_instructed(config)),
        instructed=is_instructed(config),
        weights=weights,
        pushed=pushed,
    )


def _download(name: str, files: list[str]) -> Path:
    if expanded(name).is_file():
        raise CheckpointError(told_of_file(Path(name)))
    hub_id, _, revision = name.partition("@")
    if name.startswith((".", "/", "~")) or hub_id.count("/") != 1:
        raise CheckpointError(
            f"{name!r} is neither a folder here nor a hub id (owner/name), nor a name that "
            f"`{blipq('models list')}` shows; in BLIPQ_MODELS a plus or a comma of a folder's name "
            "is written \\+ or \\,"
        )
    try:
        return Path(snapshot_download(hub_id, revision=revision or None, allow_patterns=files))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointMissing(
            f"checkpoint {name!r} is neither a folder here nor in the local cache, and the hub "
            f"did not give it ({type(error).__name__})",
            f"Fetch it where there is a network with `hf download {hub_id}`, or name a folder "
            "that holds it",
        ) from error


def _read_config(name: str, folder: Path) -> Any:
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"checkpoint {name!r} has no config.json in {folder}")
    for file in _JSON:
        _require_json(name, folder / file)
    try:
        config = read_config(folder)
    except Exception as error:  # transformers raises many kinds on a malformed configuration
        raise CheckpointError(f"checkpoint {name!r}: config.json is unusable: {error}") from error
    if not is_served(config):
        kind = config.model_type
        raise CheckpointError(f"checkpoint {name!r} is {kind!r}, not BLIP-2 or InstructBLIP")
    return config


def _require_json(name: str, file: Path) -> None:
    """Says what is wrong with a file, where transformers' own words would not."""
    try:
        found = json.loads(file.read_bytes().decode())
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:
        raise CheckpointError(f"checkpoint {name!r}: {file} is unreadable: {error}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"checkpoint {name!r}: {file} holds no JSON object")


def _weights(name: str, folder: Path) -> dict[Path, set[str] | None]:
    try:
        files = weight_files(folder)
        strays = stray_weights(folder)
    except ModelError as error:
        raise CheckpointError(f"checkpoint {name!r}: {error}") from error
    if pointers := [file.name for file in files if is_lfs_pointer(file)]:
        raise CheckpointError(
            f"checkpoint {name!r}: {_are(pointers)} in Git LFS and not here: run `git lfs pull`"
        )
    if strays:
        read = ", ".join(file.name for file in files)
        log.warning("checkpoint %r: %s not read, but %s", name, _are(strays), read)
    return files


def _are(names: list[str]) -> str:
    return f"{', '.join(names[:5])} {'is' if len(names) == 1 else 'are'}"


def _digest(files: Iterable[Path]) -> str:
    digests = []
    for file in files:
        with file.open("rb") as stream:
            digests.append(hashlib.file_digest(stream, "sha256").digest())
    return revision_of(digests)


def _family(name: str, config: Any) -> Family:
    if "Blip2ForImageTextRetrieval" in (config.architectures or ()):
        return "retrieval"
    text = config.text_config
    match text.model_type:
        case "opt":
            return "opt"
        case "t5":
            return "t5"
        case "llama" if text.rope_parameters["rope_type"] in _ROTATIONS:
            return "llama"
        case "llama":
            rotation = text.rope_parameters["rope_type"]
            raise CheckpointError(
                f"checkpoint {name!r} has a Llama with the unsupported positions {rotation!r}"
            )
        case other:
            raise CheckpointError(f"checkpoint {name!r} has the unsupported language model {other}")


def _side(image_size: int | list[int] | tuple[int, ...]) -> int:
    return image_size if isinstance(image_size, int) else image_size[0]


def _default_prompt(name: str, image_size: int, instructed: bool) -> str:
    """A known checkpoint's; of others, name or image size say that they come from COCO's."""
    if instructed:
        return INSTRUCTION
    name = name.rstrip("/").partition("@")[0]
    if name in VARIANTS:
        return VARIANTS[name].default_prompt
    return COCO_PROMPT if name.endswith("-coco") or image_size == COCO_SIDE else ""
