"""Prints how right, how large and how fast the demo model is in each precision.

`python -m tools.blip2_table` asks the models as the service does (`Blip2`, LAVIS's defaults: five
beams, short answers), on scenes that no training or tuning saw. `--write` puts the table into
`docs/blip2.md`. It ends with 1 if int8 or nf4 lose more than two points to fp32.
"""

import argparse
import random
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tools.demo_model import t5
from tools.demo_model.scores import galleries, one_each
from tools.docs.page import machine, replace_section
from transformers.utils import logging

from blipq_worker.blip2 import Blip2, EmbedItem, GenerateItem, MatchItem, Pixels
from blipq_worker.catalog.params import resolve
from blipq_worker.catalog.prompts import vqa_prompt
from blipq_worker.demo import ITM, OPT, world
from blipq_worker.serving.footprint import loaded_bytes

PAGE = Path("docs/blip2.md")
#: Quantization and compute type by the name of a row.
PRECISIONS = {
    "fp32": ("none", "float32"),
    "bf16": ("none", "bfloat16"),
    "int8": ("int8", "bfloat16"),
    "nf4": ("nf4", "bfloat16"),
}
LARGEST_LOSS = 0.02
BATCH = 32
GALLERIES = 5
TIMED_BATCHES, TIMED_SIZE = 5, 16
COLUMNS = ("caption", "VQA", "ITM", "recall@1", "weights", "images/s")


@dataclass(frozen=True)
class Row:
    """Accuracies as shares, bytes of both checkpoints, and captions per second."""

    caption: float
    vqa: float
    itm: float
    recall: float
    bytes: int
    speed: float

    @property
    def accuracies(self) -> tuple[float, ...]:
        return self.caption, self.vqa, self.itm, self.recall

    def __str__(self) -> str:
        shares = [f"{100 * share:.1f} %" for share in self.accuracies]
        return " | ".join([*shares, f"{self.bytes / 1e6:.1f} MB", f"{self.speed:.0f}"])


def measure(generation: Path, precision: str, scenes: Sequence[world.Scene]) -> Row:
    """One row: everything about one model in one precision."""
    quantization, dtype = PRECISIONS[precision]
    model = Blip2.load(str(generation), str(ITM), quantization=quantization, dtype=dtype)
    size = loaded_bytes(model.generator.model) + loaded_bytes(model.matcher.model)
    pixels = [model.preprocess(world.render(scene)) for scene in scenes]
    return Row(
        caption=_captions(model, scenes, pixels),
        vqa=_answers(model, scenes, pixels),
        itm=_matches(model, scenes, pixels),
        recall=_recall(model, scenes, pixels),
        bytes=size,
        speed=_speed(model, scenes),
    )


def _captions(model: Blip2, scenes: Sequence[world.Scene], pixels: list[Pixels]) -> float:
    said = _said(model, "caption", pixels, [""] * len(scenes))
    return _share(text == scene.caption for text, scene in zip(said, scenes, strict=True))


def _answers(model: Blip2, scenes: Sequence[world.Scene], pixels: list[Pixels]) -> float:
    """All kinds of questions together, one of each kind about every scene that allows one."""
    right: list[bool] = []
    for kind in world.QUESTION_KINDS:
        rows, asked = one_each(scenes, kind)
        prompts = [vqa_prompt(question.question.lower()) for question in asked]
        said = _said(model, "vqa", [pixels[row] for row in rows], prompts)
        right += [text == each.answer for text, each in zip(said, asked, strict=True)]
    return _share(right)


def _said(
    model: Blip2, kind: str, pixels: Sequence[Pixels], prompts: Sequence[str]
) -> Iterator[str]:
    params = resolve(kind, model.info)  # type: ignore[arg-type]
    for start in range(0, len(prompts), BATCH):
        chunk = slice(start, start + BATCH)
        pairs = zip(pixels[chunk], prompts[chunk], strict=True)
        for ((text,),) in model.generate([GenerateItem(p, (q,), params) for p, q in pairs]):
            yield text.text


def _matches(model: Blip2, scenes: Sequence[world.Scene], pixels: list[Pixels]) -> float:
    """Balanced: captions with one attribute changed are rejected, true captions accepted."""
    rng = random.Random("precision")
    accepted = []
    for start in range(0, len(scenes), BATCH):
        chunk = slice(start, start + BATCH)
        texts = [(each.caption, each.one_attribute_change(rng)) for each in scenes[chunk]]
        items = [MatchItem(p, t, "itm") for p, t in zip(pixels[chunk], texts, strict=True)]
        accepted += model.match(items)
    return statistics.mean((true > 0.5) + (false <= 0.5) for true, false in accepted) / 2


def _recall(model: Blip2, scenes: Sequence[world.Scene], pixels: list[Pixels]) -> float:
    """Of pictures by their captions, by cosine; the mean over galleries."""
    found = []
    for rows in galleries(scenes, max(1, min(GALLERIES, len(scenes) // 100))):
        images = model.embed([EmbedItem("image", pixels[row]) for row in rows])
        texts = model.embed([EmbedItem("text", text=scenes[row].caption) for row in rows])
        queries = torch.stack([torch.as_tensor(each["image_embeds_proj"]) for each in images])
        words = torch.stack([torch.as_tensor(each["text_embeds_proj"])[0] for each in texts])
        cosines = torch.einsum("iqd,td->iqt", queries.float(), words.float()).amax(dim=1)
        found.append(_share((cosines.argmax(dim=0) == torch.arange(len(rows))).tolist()))
    return statistics.mean(found)


def _share(right: "Iterator[bool] | Sequence[bool]") -> float:
    return statistics.mean(map(float, right))


def _speed(model: Blip2, scenes: Sequence[world.Scene]) -> float:
    """Captions per second with five beams in batches of 16, preprocessing left out: the median."""
    params, times = resolve("caption", model.info), []
    for number in range(TIMED_BATCHES + 1):
        some = scenes[number * TIMED_SIZE : (number + 1) * TIMED_SIZE]
        # New pixels: those above remember what was seen.
        pixels = [model.preprocess(world.render(scene)) for scene in some]
        items = [GenerateItem(each, ("",), params) for each in pixels]
        started = time.monotonic()
        model.generate(items)
        times.append(time.monotonic() - started)
    return TIMED_SIZE / statistics.median(times[1:])


def table(rows: dict[tuple[str, str], Row]) -> str:
    """A Markdown table, a line per model and precision."""
    lines = [f"| model | precision | {' | '.join(COLUMNS)} |", "|---|---|" + "---|" * len(COLUMNS)]
    lines += [f"| {name} | {precision} | {row} |" for (name, precision), row in rows.items()]
    return "\n".join(lines)


def losses(rows: dict[tuple[str, str], Row]) -> list[str]:
    """What int8 and nf4 lose more than they may, in words."""
    found = []
    for (name, precision), row in rows.items():
        pairs = zip(COLUMNS, rows[name, "fp32"].accuracies, row.accuracies, strict=False)
        found += [
            f"{name} in {precision} loses {100 * (best - share):.1f} points of {column}"
            for column, best, share in pairs
            if best - share > LARGEST_LOSS
        ]
    return found


def main() -> None:
    """Measure, print and, if asked, write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scenes", type=int, default=512)
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    scenes = [world.scene(seed) for seed in world.TEST_SEEDS[: arguments.scenes]]
    where = machine()
    rows = {}
    for name, folder in (("OPT", OPT), ("T5 twin", t5.FOLDER)):
        for precision in PRECISIONS:
            rows[name, precision] = measure(folder, precision, scenes)
            print(name, precision, rows[name, precision], flush=True)
    text = f"{table(rows)}\n\n{len(scenes)} scenes. {where}"
    print(f"\n{text}")
    if arguments.write:
        replace_section(PAGE, "precisions", text)
    if lost := losses(rows):
        raise SystemExit("\n".join(lost))


if __name__ == "__main__":
    main()
