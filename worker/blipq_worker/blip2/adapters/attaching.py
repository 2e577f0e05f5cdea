"""Puts the numbers of adapters beside the layers of a loaded generation checkpoint."""

from collections.abc import Sequence
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from blipq_worker.blip2.adapters.layers import AdaptedLinear, LowRank, Rows
from blipq_worker.catalog.adapters import Adapter, AdapterError, Flaw


def attach(model: Any, adapters: Sequence[Adapter]) -> None:
    """Gives a model's layers their adapters, numbered from 1 in this order.

    Before anything has kept a reference to these layers. Raises AdapterError, and then the model is
    of no use.
    """
    if not adapters:
        return
    rows = Rows(loaded=True)
    parts: dict[str, list[tuple[int, torch.Tensor, torch.Tensor]]] = {}
    for number, adapter in enumerate(adapters, start=1):
        for layer, (down, up) in _matrices(model, adapter).items():
            parts.setdefault(layer, []).append((number, down, up))
    for layer, each in parts.items():
        owners = [number for number, down, _ in each for _ in range(len(down))]
        downs, ups = [down for _, down, _ in each], [up for _, _, up in each]
        parent, _, name = layer.rpartition(".")
        base = model.get_submodule(layer)
        low = LowRank(torch.cat(downs), torch.cat(ups), owners, rows)
        setattr(model.get_submodule(parent), name, AdaptedLinear(base, low))
    model.adapter_rows = model.language_model.adapter_rows = rows


def _matrices(model: Any, adapter: Adapter) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """A, (rank, in), and the transpose of B with its scale, (rank, out), by layer."""
    try:
        with safe_open(adapter.file, framework="pt") as stored:
            found = {}
            for layer, target in adapter.targets.items():
                _require_fit(model, adapter, layer)
                down, up = (
                    stored.get_tensor(f"base_model.model.{layer}.lora_{side}.weight").float()
                    for side in "AB"
                )
                found[layer] = down, up.T * target.scale
    except (OSError, SafetensorError) as error:
        raise AdapterError(Flaw.UNREADABLE, f"{adapter.file} is unreadable: {error}") from error
    return {layer: _placed(model, adapter, layer, both) for layer, both in found.items()}


def _require_fit(model: Any, adapter: Adapter, layer: str) -> None:
    target = adapter.targets[layer]
    try:
        linear = model.get_submodule(layer)
    except AttributeError:
        message = f"{adapter.folder} changes {layer}, which its base does not have"
        raise AdapterError(Flaw.MISFIT, message) from None
    expected = linear.in_features, linear.out_features
    if (target.inputs, target.outputs) != expected:
        message = (
            f"{adapter.folder} changes {layer} from {target.inputs} to {target.outputs} numbers, "
            f"and its base has one from {expected[0]} to {expected[1]}: it is another model's"
        )
        raise AdapterError(Flaw.MISFIT, message)


def _placed(
    model: Any, adapter: Adapter, layer: str, both: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """On the layer's device, in the type that it computes in."""
    weight = model.get_submodule(layer).weight
    # Quantized layers keep whole numbers.
    dtype = weight.dtype
    if not dtype.is_floating_point:
        dtype = model.language_model.get_input_embeddings().weight.dtype
    down, up = (each.to(weight.device, dtype).contiguous() for each in both)
    if not bool(down.isfinite().all() and up.isfinite().all()):
        message = f"{adapter.file} has numbers at {layer} that are not finite in {dtype}"
        raise AdapterError(Flaw.UNREADABLE, message)
    return down, up
