"""Writes a checkpoint of LAVIS as a folder that transformers reads and blipq serves.

A file of LAVIS holds weights alone, and of a fine-tune only those that were trained: its runner
drops what is frozen. The rest comes from a base, a checkpoint in transformers' format.
"""

import os
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import save_torch_state_dict
from safetensors import safe_open

from blipq_worker.blip2.loading.checkpoints import describe_checkpoint
from blipq_worker.blip2.loading.configs import is_instructed
from blipq_worker.conversion.base import base_of, family_of
from blipq_worker.conversion.contents import ConversionError, read
from blipq_worker.conversion.description import fitted, write_description
from blipq_worker.conversion.names import renamed
from blipq_worker.conversion.report import Conversion
from blipq_worker.conversion.weights import (
    check,
    completed,
    require_dimensions,
    room_of,
    taken,
)


def convert(file: Path, folder: Path, base: str | None = None) -> Conversion:
    """Writes the checkpoint ``file`` to the new folder ``folder``.

    base: a known model, a hub id or a folder; without one it is the published model of the file's
    kind and width. Needs memory for the weights that are written, and disk for them and for those
    of the file. Raises ConversionError and CheckpointError; then there is no ``folder``.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConversionError(f"{folder} is there already: name a new folder")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as work:
            done = Path(work, "done")
            done.mkdir()
            conversion = _convert(file, folder, base, Path(work))
            os.replace(done, folder)
    except OSError as error:
        raise ConversionError(f"{folder} cannot be written: {error}") from error
    return conversion


def _convert(file: Path, folder: Path, base: str | None, work: Path) -> Conversion:
    """Writes to the folder ``done`` in ``work``."""
    contents = read(file, work)
    with safe_open(contents.weights, framework="pt") as stored:
        shapes = {name: tuple(stored.get_slice(name).get_shape()) for name in stored.keys()}  # noqa: SIM118
        require_dimensions(shapes)
        family = family_of(shapes)
        name = base_of(base, family, shapes, contents.model)
        description = describe_checkpoint(name)
        if description.family != family:
            raise ConversionError(
                f"{file} is a model of the kind {family}, and its base {name} one of the kind "
                f"{description.family}"
            )
        if is_instructed(description.config):
            raise ConversionError(f"the base {name} is InstructBLIP, and {file} is BLIP-2")
        config = fitted(description, shapes, contents)
        room = room_of(family, config)
        found = renamed(shapes, room.shapes)
        weights = taken(stored, found)
        with completed(weights, room, name):
            check(weights, room, f"{file} and its base {name}")
            save_torch_state_dict(weights.tensors, work / "done")
    write_description(description, config, work / "done")
    prompt = contents.model.get("prompt")
    return Conversion(
        file=str(file),
        folder=str(folder),
        family=family,
        image_size=config.vision_config.image_size,
        base=name,
        epoch=contents.epoch,
        beside=contents.beside,
        from_file=sum(map(len, found.sources.values())),
        from_base=tuple(sorted(weights.from_base)),
        left_out=tuple(found.left_out),
        unknown=tuple(found.unknown),
        prompt=prompt if isinstance(prompt, str) else None,
        resized=weights.resized,
    )
