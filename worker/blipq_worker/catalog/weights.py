"""Where a checkpoint's files are, here or in S3, or what it takes to get them. Without torch."""

import importlib.util
import json
import os
import shutil
from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path

from blipq.s3.refusals import S3Unavailable
from blipq_worker.catalog.models import PARAMETERS, ModelError, ServedModel, served_model
from blipq_worker.catalog.s3.objects import Objects
from blipq_worker.catalog.s3.places import is_in_s3, place_of

WHOLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER = "adapter_config.json"

_LFS = b"version https://git-lfs"
_PICKLED = "is pickled, which is not loaded: save it again with transformers' save_pretrained"
#: What a file of weights is that cannot be served, by the end of its name.
_NOT_SERVED = {
    ".pth": "is in LAVIS's format: write it as a folder with `blipq models convert`",
    **dict.fromkeys((".bin", ".pt", ".ckpt"), _PICKLED),
}

#: The published checkpoints are stored in fp32.
_BYTES_PER_PARAMETER = 4


@dataclass(frozen=True, slots=True)
class Weights:
    """The weights of one checkpoint: a hub id, a folder, or a place in S3.

    bytes: what they take where they are stored, or would (None: unknown). present: whether they are
    all here, or in S3. problem: why those in S3 cannot be read.
    """

    checkpoint: str
    present: bool
    bytes: int | None
    problem: str | None = None

    @property
    def command(self) -> str | None:
        """What fetches them; None for what no hub has."""
        if "/" not in self.checkpoint or self.checkpoint.startswith((".", "/", "~", "s3://")):
            return None
        hub_id, _, revision = self.checkpoint.partition("@")
        at = f" --revision {revision}" if revision else ""
        # Pickled copies of the same weights would double the download.
        return f"hf download {hub_id}{at} --exclude '*.bin'"


def expanded(path: str) -> Path:
    """A path with its ``~``, which stays, as for the hub's own library, where there is no home."""
    return Path(os.path.expanduser(path))


def hub_cache() -> Path:
    """The folder that the hub's downloads are kept in."""
    home = os.environ.get("HF_HOME") or "~/.cache/huggingface"
    return expanded(os.environ.get("HF_HUB_CACHE") or f"{home}/hub")


def free_bytes() -> int:
    """Free disk space for downloads."""
    folder = hub_cache()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def weights_of(checkpoint: str) -> Weights:
    """What is known of a checkpoint's weights. For those in S3 one try is made."""
    if is_in_s3(checkpoint):
        return _in_s3(checkpoint)
    folder = expanded(checkpoint)
    if folder.is_dir():
        size = _complete_size(folder)
        return Weights(checkpoint, size is not None, size)
    hub_id, _, revision = checkpoint.partition("@")
    snapshots = hub_cache() / f"models--{hub_id.replace('/', '--')}" / "snapshots"
    for snapshot in sorted(snapshots.glob(revision or "*")):
        size = _complete_size(snapshot)
        if size is not None:
            return Weights(checkpoint, True, size)
    parameters = PARAMETERS.get(hub_id)
    expected = None if parameters is None else parameters * _BYTES_PER_PARAMETER
    return Weights(checkpoint, False, expected)


def _in_s3(checkpoint: str) -> Weights:
    try:
        objects = Objects(place_of(checkpoint), tries=1)
        manifest = objects.manifest()
        objects.check_weights(manifest)
    except (ModelError, S3Unavailable) as error:
        return Weights(checkpoint, False, None, str(error))
    return Weights(checkpoint, True, sum(each.bytes for each in manifest.weights.values()))


def weights_of_served(models: dict[str, str]) -> list[Weights]:
    """The weights of every served model, each once."""
    wanted: list[str] = []
    for name, what in models.items():
        served: ServedModel = served_model(name, what)
        wanted += [each for each in (served.generation, served.retrieval) if each]
    return [weights_of(checkpoint) for checkpoint in dict.fromkeys(wanted)]


def how_to_get(missing: list[Weights]) -> str:
    """One line: what to run, how much it fetches, and the room there is for it."""
    fetched = [each for each in missing if each.command]
    lacks = [
        each.problem or _lack(expanded(each.checkpoint)) for each in missing if not each.command
    ]
    return "; ".join([*([_fetch(fetched)] if fetched else []), *lacks])


def _fetch(missing: list[Weights]) -> str:
    commands = [f"`{each.command}`" for each in missing]
    known = [each.bytes for each in missing if each.bytes is not None]
    size = f"about {gigabytes(sum(known))}" if len(known) == len(missing) else "of unknown size"
    room = f"{gigabytes(free_bytes())} free in {hub_cache()}"
    text = f"fetch them where there is a network with {' and '.join(commands)} ({size}; {room})"
    if importlib.util.find_spec("huggingface_hub") is None:
        text += "; hf comes with blipq-worker"
    return text


def _lack(folder: Path) -> str:
    """Why a folder is no checkpoint."""
    if folder.is_file():
        return told_of_file(folder)
    if not folder.is_dir():
        return f"there is no folder {folder}"
    try:
        weight_files(folder)
    except ModelError as error:
        return f"{folder}: {error}"
    return f"{folder} has no config.json"


def gigabytes(count: int) -> str:
    """Bytes as people write disk sizes."""
    return f"{count / 1e9:.1f} GB" if count >= 0.1e9 else f"{count / 1e6:.1f} MB"


def _complete_size(folder: Path) -> int | None:
    """Bytes of the weights in a folder, or None where some are missing."""
    try:
        files = weight_files(folder)
    except ModelError:
        return None
    if not (folder / "config.json").exists():
        return None
    return sum(file.stat().st_size for file in files)


def weight_files(folder: Path, there: Container[str] | None = None) -> dict[Path, set[str] | None]:
    """The files that hold a checkpoint's weights, and which tensors of each (None: all of them).

    As transformers chooses them: ``model.safetensors``, or what its index names; never what merely
    lies beside them. there: the names of files that count as being in the folder, where they are
    elsewhere. Raises ModelError.
    """
    if there is None:
        there = {each.name for each in folder.iterdir() if each.exists()}
    if ADAPTER in there:
        raise ModelError(
            f"its folder holds a LoRA adapter ({ADAPTER}): serve it over its base by "
            "BLIPQ_ADAPTERS=name=base:folder, or merge it into its base model with peft's "
            "merge_and_unload, save that with save_pretrained, and keep the adapter elsewhere"
        )
    if WHOLE in there:
        return {folder / WHOLE: None}
    if INDEX not in there:
        raise ModelError(f"it has no {WHOLE} and no {INDEX}{_found_instead(folder)}")
    files = _indexed(folder / INDEX)
    missing = sorted(file.name for file in files if file.name not in there)
    if missing:
        raise ModelError(f"it lacks weights that {INDEX} names: {', '.join(missing[:3])}")
    return files


def is_lfs_pointer(file: Path) -> bool:
    """Whether a clone left only the name of a file in Git LFS, and not its bytes."""
    with file.open("rb") as opened:
        return opened.read(len(_LFS)) == _LFS


def stray_weights(folder: Path) -> list[str]:
    """Names of the files of weights in a folder that are not read."""
    read = {file.name for file in weight_files(folder)}
    return sorted({file.name for file in folder.glob("*.safetensors")} - read)


def told_of_file(file: Path) -> str:
    """What a file is that was named where a checkpoint's folder is expected."""
    reason = _NOT_SERVED.get(file.suffix)
    return f"{file} is a file: name a checkpoint's folder" + (f"; it {reason}" if reason else "")


def _found_instead(folder: Path) -> str:
    for file in sorted(folder.iterdir()):
        if file.suffix in _NOT_SERVED:
            return f"; {file.name} {_NOT_SERVED[file.suffix]}"
    if some := sorted(file.name for file in folder.glob("*.safetensors")):
        return f", but {', '.join(some[:3])}: rename a single file, or bring the index of several"
    return ""


def _indexed(index: Path) -> dict[Path, set[str] | None]:
    """The files that an index names, with the tensors that are to be taken from each."""
    tensors: dict[str, set[str]] = {}
    for tensor, name in _weight_map(index).items():
        tensors.setdefault(name, set()).add(tensor)
    return {index.parent / name: tensors[name] for name in sorted(tensors)}


def _weight_map(index: Path) -> dict[str, str]:
    try:
        found: dict[str, str] = json.loads(index.read_text("utf-8"))["weight_map"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{INDEX} is unusable: {type(error).__name__}: {error}") from error
    plain = isinstance(found, dict) and all(
        isinstance(name, str) and name == Path(name).name for name in found.values()
    )
    if not plain or not found:
        raise ModelError(f"{INDEX} is unusable: its weight_map must name files beside it")
    return found
