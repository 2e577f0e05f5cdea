"""Where a checkpoint's files are on this machine, or what it takes to get them. Without torch."""

import importlib.util
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from blipq_worker.models import PARAMETERS, ServedModel, served_model

#: The published checkpoints are stored in fp32.
_BYTES_PER_PARAMETER = 4


@dataclass(frozen=True, slots=True)
class Weights:
    """The weights of one checkpoint: a hub id or a folder.

    bytes: what they take on disk, or would (None: unknown). present: whether they are all here.
    """

    checkpoint: str
    present: bool
    bytes: int | None

    @property
    def command(self) -> str | None:
        """What fetches them; None for a folder, which no hub has."""
        if "/" not in self.checkpoint or self.checkpoint.startswith((".", "/", "~")):
            return None
        hub_id, _, revision = self.checkpoint.partition("@")
        at = f" --revision {revision}" if revision else ""
        # Pickled copies of the same weights would double the download.
        return f"hf download {hub_id}{at} --exclude '*.bin'"


def hub_cache() -> Path:
    """The folder that the hub's downloads are kept in."""
    home = os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface"
    return Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub").expanduser()


def free_bytes() -> int:
    """Free disk space for downloads."""
    folder = hub_cache()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def weights_of(checkpoint: str) -> Weights:
    """What is known of a checkpoint's weights."""
    folder = Path(checkpoint).expanduser()
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


def weights_of_served(models: dict[str, str]) -> list[Weights]:
    """The weights of every served model, each once."""
    wanted: list[str] = []
    for name, what in models.items():
        served: ServedModel = served_model(name, what)
        wanted += [each for each in (served.generation, served.retrieval) if each]
    return [weights_of(checkpoint) for checkpoint in dict.fromkeys(wanted)]


def how_to_get(missing: list[Weights]) -> str:
    """One line: what to run, how much it fetches, and the room there is for it."""
    commands = [f"`{each.command}`" for each in missing if each.command]
    if not commands:
        folders = ", ".join(each.checkpoint for each in missing)
        return f"put config.json and *.safetensors into {folders}"
    known = [each.bytes for each in missing if each.bytes is not None]
    size = f"about {gigabytes(sum(known))}" if len(known) == len(missing) else "of unknown size"
    room = f"{gigabytes(free_bytes())} free in {hub_cache()}"
    text = f"fetch them where there is a network with {' and '.join(commands)} ({size}; {room})"
    if importlib.util.find_spec("huggingface_hub") is None:
        text += "; hf comes with pip install 'blipq[worker]'"
    return text


def gigabytes(count: int) -> str:
    """Bytes as people write disk sizes."""
    return f"{count / 1e9:.1f} GB"


def _complete_size(folder: Path) -> int | None:
    """Bytes of the weights in a folder, or None where some are missing."""
    files = set(folder.glob("*.safetensors"))
    index = folder / "model.safetensors.index.json"
    if index.exists():
        files = {folder / name for name in json.loads(index.read_text())["weight_map"].values()}
    if not files or not (folder / "config.json").exists():
        return None
    if not all(file.exists() for file in files):
        return None
    return sum(file.stat().st_size for file in files)
