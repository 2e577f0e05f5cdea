"""What adapters cost: steps with rows of several against steps without, and memory.

    python -m benchmarks.adapters --adapters 8 --rows 8 32 --repeats 9

On the mid-size model with random weights. Both kinds of steps are taken in turns, in the same
process; of each the median counts. Run it on a quiet machine.
"""

import argparse
import json
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tools.docs.page import replace_section

from benchmarks import results
from benchmarks.models import mid_size
from blipq_worker.blip2 import Blip2
from blipq_worker.blip2.decoding import DecodeLoop, Row
from blipq_worker.blip2.decoding.static import static_loop, ways
from blipq_worker.catalog.adapters import Adapter, read_adapter
from blipq_worker.inference.requests import GenerationParams
from blipq_worker.serving.footprint import loaded_bytes

PAGE = Path(__file__).parents[1] / "docs" / "adapters.md"
STEPS, PROMPT = 40, [2, 5, 6, 7]
PARAMS = GenerationParams(num_beams=1, max_new_tokens=STEPS + 4, min_new_tokens=STEPS + 4)
RECIPE = ("q_proj", "k_proj")
TARGETS = {"recipe": RECIPE, "all": (*RECIPE, "v_proj", "out_proj", "fc1", "fc2")}


def written(folder: Path, checkpoint: str, targets: Sequence[str], rank: int, seed: int) -> Adapter:
    """An adapter of random numbers, as PEFT stores it."""
    dice = torch.Generator().manual_seed(seed)
    tensors = {}
    with safe_open(Path(checkpoint) / "model.safetensors", framework="pt") as stored:
        names = stored.keys()
        for name in names:
            layer, _, kind = name.rpartition(".")
            known = kind == "weight" and layer.rpartition(".")[2] in targets
            if not known or not layer.startswith("language_model."):
                continue
            wide, narrow = stored.get_slice(name).get_shape()
            for side, shape in (("A", (rank, narrow)), ("B", (wide, rank))):
                key = f"base_model.model.{layer}.lora_{side}.weight"
                tensors[key] = torch.randn(shape, generator=dice) / 16
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return read_adapter(str(folder))


def step_ms(loop: Any, number: int, adapters: int) -> float:
    """Milliseconds a step of so many rows, which have the adapters in turn."""
    weight = loop_weight(loop)
    queries = torch.randn(32, weight.shape[1], device=weight.device).to(weight.dtype)
    numbers = [1 + index % adapters if adapters else 0 for index in range(number)]
    rows = [Row(queries, PROMPT, PARAMS, adapter=each) for each in numbers]
    loop.join(rows)
    loop.step(rows)
    wait(weight.device)
    started = time.monotonic()
    for _ in range(STEPS):
        loop.step(rows)
    wait(weight.device)
    took = 1000 * (time.monotonic() - started) / STEPS
    loop.leave(rows)
    return took


def loop_weight(loop: Any) -> torch.Tensor:
    language = loop._language if isinstance(loop, DecodeLoop) else loop._step.language
    weight: torch.Tensor = language._model.get_input_embeddings().weight
    return weight


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def loop_of(model: Blip2, slots: int) -> Any:
    """As a worker runs it: growing slots on a CPU, static ones on a GPU."""
    language = model.generator.model.language_model
    if model.info.device == "cpu":
        return DecodeLoop(language, ends=(), slots=slots)
    loop = static_loop(language, ends=(), slots=slots, budget=0, among=ways(graphs=True))
    assert loop is not None
    return loop


def compare(
    checkpoint: str, targets: Sequence[str], options: argparse.Namespace, folder: Path
) -> dict[str, Any]:
    """Steps without adapters against steps of all of them, and the bytes of both models."""
    plain = Blip2.load(checkpoint, dtype=options.dtype, device=options.device)
    layers = plain.generator.model
    adapters = [
        written(folder / str(number), checkpoint, targets, options.rank, number)
        for number in range(options.adapters)
    ]
    adapted = Blip2.load(checkpoint, dtype=options.dtype, device=options.device, adapters=adapters)
    found: dict[str, Any] = {
        "model_mb": loaded_bytes(layers) / 1e6,
        "with_adapters_mb": loaded_bytes(adapted.generator.model) / 1e6,
        "two_models_mb": 2 * loaded_bytes(layers) / 1e6,
    }
    steps: dict[str, Any] = {}
    for rows in options.rows:
        pair = [loop_of(plain, rows), loop_of(adapted, rows)]
        times: list[list[float]] = [[], []]
        for _ in range(options.repeats):
            times[0].append(step_ms(pair[0], rows, 0))
            times[1].append(step_ms(pair[1], rows, options.adapters))
        without, beside = map(statistics.median, times)
        ratios = [second / first for first, second in zip(*times, strict=True)]
        steps[str(rows)] = {
            "without_ms": without,
            "adapters_ms": beside,
            "ratio": statistics.median(ratios),
        }
    return {**found, "steps": steps}


def measured(options: argparse.Namespace) -> dict[str, Any]:
    """Steps and memory for each choice of layers."""
    checkpoint = mid_size().split("+")[0]
    with TemporaryDirectory() as folder, torch.inference_mode():
        return {
            "adapters": options.adapters,
            "rank": options.rank,
            "dtype": options.dtype,
            "targets": {
                name: compare(checkpoint, targets, options, Path(folder, name))
                for name, targets in TARGETS.items()
                if name in options.targets
            },
        }


def text(found: Mapping[str, Any]) -> Iterator[str]:
    """The table, in Markdown."""
    yield (
        f"| {found['adapters']} adapters of rank {found['rank']} | a step's rows | without, ms "
        "| with, ms | ratio | one model, MB | with them, MB | two models, MB |"
    )
    yield f"|{'---|' * 8}"
    for name, each in found["targets"].items():
        sizes = (f"{each[key]:.0f}" for key in ("model_mb", "with_adapters_mb", "two_models_mb"))
        held = " | ".join(sizes)
        for rows, step in each["steps"].items():
            layers = ", ".join(f"`{layer}`" for layer in TARGETS[name])
            yield (
                f"| {layers} | {rows} | {step['without_ms']:.1f} | {step['adapters_ms']:.1f} "
                f"| **{step['ratio']:.2f}** | {held} |"
            )


def main() -> None:
    """Measures, keeps the figures, and writes them into docs/adapters.md."""
    parser = argparse.ArgumentParser("python -m benchmarks.adapters", description=__doc__)
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rows", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--targets", choices=TARGETS, nargs="+", default=[*TARGETS])
    options = parser.parse_args()
    found = results.measure(
        "adapters", lambda: measured(options), command="python -m benchmarks.adapters"
    )
    lines = [*text(found), "", results.source("adapters")]
    replace_section(PAGE, "cost", "\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
