"""Prints how often the models are right on pictures that no training or tuning saw.

`python -m tools.demo_model.evaluate` also writes it to `docs/demo-model.md`.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tools.demo_model import inference, t5
from tools.demo_model.scores import generation_scores, matching_scores
from tools.demo_model.texts import PLAIN, SHORT
from torch import Tensor
from transformers import (
    AutoProcessor,
    Blip2ForConditionalGeneration,
    Blip2ForImageTextRetrieval,
    Blip2Processor,
    PreTrainedModel,
)

from blipq_worker.demo import ITM, OPT, world

PAGE = Path("docs/demo-model.md")
TEMPLATE = Path(__file__).with_name("page.md")
GALLERIES = 5
TWIN_IS_RIGHT = 0.9
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Part:
    """A table of the page: one model, asked in one way."""

    title: str
    folder: Path
    model_class: type[PreTrainedModel]
    scores: Callable[[PreTrainedModel, Blip2Processor, Sequence[world.Scene], Tensor], dict]


def _language(
    answer: inference.Decoding, caption: inference.Decoding = inference.CAPTION, prompt: str = SHORT
) -> Callable[..., dict[str, float]]:
    return lambda model, processor, scenes, images: generation_scores(
        model, processor.tokenizer, scenes, images, caption, answer, prompt
    )


def _matching(
    model: Blip2ForImageTextRetrieval,
    processor: Blip2Processor,
    scenes: Sequence[world.Scene],
    images: Tensor,
) -> dict[str, float]:
    return matching_scores(model, processor.tokenizer, scenes, images, GALLERIES)


PARTS = [
    Part(
        f'Captions and answers, `"{SHORT}"`, 5 beams',
        OPT,
        Blip2ForConditionalGeneration,
        _language(inference.OPT_ANSWER),
    ),
    Part(
        f'Captions and answers, `"{PLAIN}"`, greedy',
        OPT,
        Blip2ForConditionalGeneration,
        _language(inference.GREEDY, inference.GREEDY, PLAIN),
    ),
    Part("Matching and search", ITM, Blip2ForImageTextRetrieval, _matching),
    Part(
        f'The twin under `tests/models/t5`, `"{SHORT}"`, 5 beams',
        t5.FOLDER,
        Blip2ForConditionalGeneration,
        _language(inference.T5_ANSWER),
    ),
]


@torch.no_grad()
def measure(part: Part, scenes: Sequence[world.Scene], dtype: torch.dtype) -> dict[str, float]:
    """The scores of a part, loaded as the service loads it."""
    model = part.model_class.from_pretrained(part.folder, dtype=dtype, local_files_only=True)
    model.to(dtype).eval()
    processor = AutoProcessor.from_pretrained(part.folder, local_files_only=True)
    images = []
    for start in range(0, len(scenes), 50):
        rendered = [world.render(scene) for scene in scenes[start : start + 50]]
        pixels = processor.image_processor(rendered, return_tensors="pt")["pixel_values"]
        images.append(model.vision_model(pixels.to(dtype)).last_hidden_state)
    return part.scores(model, processor, scenes, torch.cat(images))


def table(title: str, scores: dict[str, dict[str, float]]) -> str:
    """Scores by precision and row, in Markdown."""
    lines = [f"| {title} | {' | '.join(scores)} |", "|---|" + "---|" * len(scores)]
    for row in next(iter(scores.values())):
        values = " | ".join(f"{100 * by_row[row]:.1f} %" for by_row in scores.values())
        lines.append(f"| {row} | {values} |")
    return "\n".join(lines)


def verdict(twin: dict[str, float]) -> str:
    """What the twin's scores allow it to be used for."""
    worst = min(twin, key=twin.__getitem__)
    if twin[worst] < TWIN_IS_RIGHT:
        return (
            f"The twin is right in only {100 * twin[worst]:.0f} % of its weakest kind ({worst}): "
            "it serves for equality tests only (batched against alone, cached or not)."
        )
    return f"The twin is right in at least {100 * twin[worst]:.0f} % of every kind."


def machine() -> str:
    """What this was measured on, in words."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    name = next((line.split(":")[1].strip() for line in lines if "model name" in line), "a CPU")
    return f"{name}, {torch.get_num_threads()} thread(s), PyTorch {torch.__version__}"


def main() -> None:
    """Measure, print and write the page."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--scenes", type=int, default=640)
    scenes = [world.scene(seed) for seed in world.TEST_SEEDS[: arguments.parse_args().scenes]]
    tables = []
    for part in PARTS:
        scores = {name: measure(part, scenes, dtype) for name, dtype in PRECISIONS.items()}
        tables.append(table(part.title, scores))
        print(tables[-1], end="\n\n", flush=True)
    filled = {
        "{machine}": machine(),
        "{scenes}": str(len(scenes)),
        "{tables}": "\n\n".join(tables),
        "{verdict}": verdict(scores["fp32"]),
    }
    page = TEMPLATE.read_text()
    for name, value in filled.items():
        page = page.replace(name, value)
    PAGE.write_text(page)


if __name__ == "__main__":
    main()
