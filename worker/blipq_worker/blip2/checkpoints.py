"""Finds a BLIP-2 checkpoint and reads what it is, before any weight is loaded."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from transformers import Blip2Config

from blipq.errors import BlipqError
from blipq_worker.models import COCO_PROMPT, COCO_SIDE, VARIANTS, Family

_NEEDED = ["*.json", "*.txt", "*.model", "*.safetensors"]


class CheckpointError(BlipqError):
    """A checkpoint is missing, incomplete or of the wrong kind; the message says what to do."""


class CheckpointMissing(CheckpointError):
    """A checkpoint is neither here nor to be had from the hub; ``what`` says so without advice."""

    def __init__(self, what: str, advice: str) -> None:
        super().__init__(f"{what}. {advice}")
        self.what = what


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint in a local folder.

    name: as it was asked for. revision: the hub's commit, or the SHA-256 of the weights (of a
    single file: that file's own; of several: of their digests in the order of their names).
    default_prompt: what LAVIS puts before a caption.
    """

    name: str
    folder: Path
    revision: str
    config: Any
    family: Family
    image_size: int
    num_query_tokens: int
    default_prompt: str


def open_checkpoint(name: str) -> Checkpoint:
    """The checkpoint in the local folder ``name``, or with the hub id ``name`` (``id@revision``).

    Raises CheckpointError.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        config = _read_config(name, folder)
        revision = _digest(_weights(name, folder))
    else:
        folder = _download(name)
        config = _read_config(name, folder)
        _weights(name, folder)
        revision = folder.name
    family, image_size = _family(name, config), _side(config.vision_config.image_size)
    return Checkpoint(
        name=name,
        folder=folder,
        revision=revision,
        config=config,
        family=family,
        image_size=image_size,
        num_query_tokens=config.num_query_tokens,
        default_prompt=_default_prompt(name, image_size),
    )


def _download(name: str) -> Path:
    hub_id, _, revision = name.partition("@")
    if name.startswith((".", "/", "~")) or hub_id.count("/") != 1:
        raise CheckpointError(f"{name!r} is neither a folder here nor a hub id (owner/name)")
    try:
        return Path(snapshot_download(hub_id, revision=revision or None, allow_patterns=_NEEDED))
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
    try:
        config = Blip2Config.from_pretrained(folder)
    except Exception as error:  # transformers raises many kinds on a malformed configuration
        raise CheckpointError(f"checkpoint {name!r}: config.json is unusable: {error}") from error
    if config.model_type != "blip-2":
        raise CheckpointError(f"checkpoint {name!r} is {config.model_type!r}, not BLIP-2")
    return config


def _weights(name: str, folder: Path) -> list[Path]:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(
            f"checkpoint {name!r} has no *.safetensors in {folder}. Pickled weights (*.bin) are "
            "not loaded: save them again with transformers' save_pretrained"
        )
    return files


def _digest(files: list[Path]) -> str:
    digests = []
    for file in files:
        with file.open("rb") as stream:
            digests.append(hashlib.file_digest(stream, "sha256"))
    if len(digests) == 1:
        return digests[0].hexdigest()
    return hashlib.sha256(b"".join(digest.digest() for digest in digests)).hexdigest()


def _family(name: str, config: Any) -> Family:
    if "Blip2ForImageTextRetrieval" in (config.architectures or ()):
        return "retrieval"
    match config.text_config.model_type:
        case "opt":
            return "opt"
        case "t5":
            return "t5"
        case other:
            raise CheckpointError(f"checkpoint {name!r} has the unsupported language model {other}")


def _side(image_size: int | list[int] | tuple[int, ...]) -> int:
    return image_size if isinstance(image_size, int) else image_size[0]


def _default_prompt(name: str, image_size: int) -> str:
    """A known checkpoint's; of others, name or image size say that they come from COCO's."""
    name = name.rstrip("/").partition("@")[0]
    if name in VARIANTS:
        return VARIANTS[name].default_prompt
    return COCO_PROMPT if name.endswith("-coco") or image_size == COCO_SIDE else ""
