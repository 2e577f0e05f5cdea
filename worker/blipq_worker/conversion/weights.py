"""The weights of a folder that is written: the file's under their new names, and the base's."""

import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from safetensors import safe_open

from blipq_worker.blip2.loading.checkpoints import open_checkpoint
from blipq_worker.conversion.contents import ConversionError
from blipq_worker.conversion.names import QKV_BIAS, Renamed
from blipq_worker.inference.requests import Family

Shapes = Mapping[str, tuple[int, ...]]

_POSITIONS = "vision_model.embeddings.position_embedding"
#: Of LAVIS's weights by which the model's sizes are known: how many dimensions each has.
_DIMENSIONS = {
    "query_tokens": 3,
    "visual_encoder.pos_embed": 3,
    **dict.fromkeys(("opt_proj.weight", "t5_proj.weight", "vision_proj.weight"), 2),
}
_BIASES = (".attn.q_bias", ".attn.v_bias")
_WIDEST = 2**24  # of any dimension; a weight without numbers may say anything of the others
_OUTPUT = "language_model.lm_head.weight"


@dataclass(frozen=True, slots=True)
class Room:
    """What a model of transformers takes: shapes of weights by name.

    tied: names of weights that are another's, with the other's; they need not be stored.
    """

    shapes: Shapes
    tied: Mapping[str, str]


@dataclass(slots=True)
class Weights:
    """Weights by transformers' names. from_base: which of them the file lacks.

    resized: the base's position embeddings were, for images of another size.
    """

    tensors: dict[str, torch.Tensor]
    from_base: list[str] = field(default_factory=list)
    resized: bool = False


def room_of(family: Family, config: Any) -> Room:
    """What a model of this configuration takes; it is not built."""
    retrieval = family == "retrieval"
    name = "Blip2ForImageTextRetrieval" if retrieval else "Blip2ForConditionalGeneration"
    with torch.device("meta"):
        model = getattr(transformers, name)(config)
    tied = dict(model.all_tied_weights_keys)
    # Transformers calls every T5 tied, and remembers by this that Flan's output layer is its own.
    if not getattr(config.text_config, "scale_decoder_outputs", True):
        tied.pop(_OUTPUT, None)
    return Room({name: tuple(each.shape) for name, each in model.state_dict().items()}, tied)


def require_dimensions(shapes: Shapes) -> None:
    """Raises ConversionError where weights that say how the model is built have odd shapes.

    shapes: by LAVIS's names.
    """
    for name, shape in shapes.items():
        number = 1 if name.endswith(_BIASES) else _DIMENSIONS.get(name)
        if number is None:
            continue
        if len(shape) != number or not all(0 < each <= _WIDEST for each in shape):
            raise ConversionError(f"the file's {name} has the shape {shape}, as no model has it")


def taken(stored: Any, found: Renamed) -> Weights:
    """The file's weights under transformers' names. Raises ConversionError."""
    return Weights({name: _made(stored, name, some) for name, some in found.sources.items()})


def _made(stored: Any, name: str, sources: list[str]) -> torch.Tensor:
    parts: list[torch.Tensor] = [stored.get_tensor(each) for each in sources]
    if not name.endswith(QKV_BIAS):
        if len(parts) != 1:
            raise ConversionError(f"the file has one weight twice: {' and '.join(sources)}")
        return parts[0]
    if len(parts) != 2:
        raise ConversionError(f"the file has {sources[0]} alone, of the biases of its attention")
    queries, values = parts  # in the order of their names
    return torch.cat([queries, torch.zeros_like(queries), values])  # EVA's keys have no bias


@contextmanager
def completed(weights: Weights, room: Room, base: str) -> Iterator[None]:
    """Adds what the file lacks and the base has, whose files are open until the end."""
    own = weights.tensors
    lacking = {name for name in room.shapes if name not in own and room.tied.get(name) not in own}
    with ExitStack() as files:
        # The base's weights, which may be fetched first, are not needed where none is lacking.
        for path, names in open_checkpoint(base).weights.items() if lacking else ():
            file = files.enter_context(safe_open(path, framework="pt"))
            for name in sorted(lacking & set(names or file.keys())):
                own[name] = file.get_tensor(name)
                weights.from_base.append(name)
        _fit_positions(weights, room)
        _untie(own, room)
        yield


def check(weights: Weights, room: Room, where: str) -> None:
    """Raises ConversionError where a weight is missing, or has another shape than the model's."""
    own = weights.tensors
    missing = [name for name in room.shapes if name not in own and room.tied.get(name) not in own]
    if missing:
        raise ConversionError(f"{where} both lack {len(missing)} weights: {_some(missing)}")
    wrong = [name for name, each in own.items() if tuple(each.shape) != room.shapes[name]]
    if wrong:
        shape, needed = tuple(own[wrong[0]].shape), room.shapes[wrong[0]]
        raise ConversionError(
            f"{where} do not belong together: {wrong[0]} has the shape {shape}, where the base's "
            f"configuration has {needed} ({len(wrong)} such weights); name another base (--base)"
        )


def _fit_positions(weights: Weights, room: Room) -> None:
    """Resizes the base's position embeddings to the file's image size, as LAVIS does."""
    if _POSITIONS not in weights.from_base:
        return
    positions = weights.tensors[_POSITIONS]
    before, after = (math.isqrt(n - 1) for n in (positions.shape[1], room.shapes[_POSITIONS][1]))
    if before == after:
        return
    first, grid = positions[:, :1], positions[:, 1:].float()
    grid = grid.reshape(1, before, before, -1).permute(0, 3, 1, 2)
    grid = torch.nn.functional.interpolate(
        grid, size=(after, after), mode="bicubic", align_corners=False
    )
    grid = grid.permute(0, 2, 3, 1).flatten(1, 2).to(first.dtype)
    weights.tensors[_POSITIONS] = torch.cat([first, grid], dim=1)
    weights.resized = True


def _untie(own: dict[str, torch.Tensor], room: Room) -> None:
    """Drops weights that are another's, where they are equal: stored twice they only take room."""
    for name, source in room.tied.items():
        if name in own and source in own and _are_equal(own[name], own[source]):
            del own[name]


def _are_equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    """At the lower of their precisions: what LAVIS leaves of a frozen model it had in 16 bits."""
    least = min(one.dtype, other.dtype, key=lambda dtype: dtype.itemsize)
    return torch.equal(one.to(least), other.to(least))


def _some(names: list[str]) -> str:
    return ", ".join(sorted(names)[:3])
