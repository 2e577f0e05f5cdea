"""Whether heat maps lie on what a text names: ``python -m benchmarks.heatmaps [--scenes N]``.

Scenes of the demo model's world, of seeds that no model was trained on. A shape's share of a map is
compared with its share of the picture's area; a map is good where it is at least twice that. Texts
name one shape of the scene. Words are those for kind and colour in captions of two shapes that
share neither. ``others`` are maps by other definitions, for texts alone.
"""

import argparse
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from blipq_worker import demo
from blipq_worker.blip2 import Blip2, ExplainItem
from blipq_worker.blip2.heads.heatmaps import read_plain
from blipq_worker.blip2.loading.checkpoints import open_checkpoint
from blipq_worker.demo.world import TEST_SEEDS, Mention, Scene, scene
from blipq_worker.demo.world.drawing import outlines, render

Map = NDArray[np.float64]

#: Side of the grid that areas are counted on.
_GRID = 512


class Measured(NamedTuple):
    """Shares of good maps, and the median of a map's share by the area's."""

    texts: float
    words: float
    median_text: float
    median_word: float


@dataclass(frozen=True, slots=True)
class Case:
    """A scene, and a text with the shapes that it and its words name, by their number."""

    scene: Scene
    text: str
    shape: int | None
    words: dict[str, int]


def cases(count: int, start: int = 5_000) -> list[Case]:
    """As many scenes with a shape, each with a text of one shape; captions beside them."""
    found = []
    shown = (scene(seed) for seed in TEST_SEEDS[start:])
    for each in itertools.islice((one for one in shown if one.shapes), count):
        for number, shape in enumerate(each.shapes):
            found.append(Case(each, Mention(shape.color, shape.kind).text, number, {}))
        words = [word for shape in each.shapes for word in (shape.color, shape.kind)]
        if len(set(words)) == 4:
            named = {word: number // 2 for number, word in enumerate(words)}
            found.append(Case(each, each.caption, None, named))
    return found


def measured(model: Blip2, asked: Sequence[Case]) -> Measured:
    """How good the maps of jobs are."""
    texts, words = [], []
    for case in asked:
        item = ExplainItem(model.preprocess(render(case.scene)), (case.text,))
        maps = model.explain([item])[0]["0"]
        if case.shape is not None:
            texts.append(gain(maps[0], case.scene, case.shape))
        for word, map_ in zip(case.text.split(), maps[1:], strict=True):
            if word in case.words:
                words.append(gain(map_, case.scene, case.words[word]))
    return Measured(good(texts), good(words), float(np.median(texts)), float(np.median(words)))


def gain(map_: Any, shown: Scene, shape: int) -> float:
    """A shape's share of a map (rows, columns) by its share of the area."""
    area = covered(shown, shape, len(map_))
    whole = max(float(np.sum(map_)), 1e-12)
    return float(np.sum(map_ * area)) / whole / float(area.mean())


def good(gains: Sequence[float]) -> float:
    """The share of maps that have at least twice what the area has."""
    return float(np.mean(np.array(gains) >= 2))


def covered(shown: Scene, shape: int, side: int) -> Map:
    """How much of each patch a shape covers, (side, side)."""
    mask = Image.new("L", (_GRID, _GRID))
    corners = [(x * _GRID, y * _GRID) for x, y in outlines(shown)[shape]]
    ImageDraw.Draw(mask).polygon(corners, fill=1)
    step = _GRID // side
    return np.asarray(mask, float).reshape(side, step, side, step).mean(axis=(1, 3))


def others(model: Blip2, asked: Sequence[Case]) -> dict[str, float]:
    """Shares of good maps of texts by other definitions."""
    assert model.matcher is not None
    reader = read_plain(open_checkpoint(str(demo.ITM)), torch.device("cpu"))
    gains: dict[str, list[float]] = {}
    for case in asked:
        if case.shape is None:
            continue
        pixels = model.preprocess(render(case.scene))
        with torch.inference_mode():
            seen = model.matcher.vision.patches([pixels])
        ids = torch.tensor([model.matcher.texts.ids(case.text)])
        for name, map_ in _definitions(reader, seen.clone().float(), ids):
            side = round(len(map_) ** 0.5)
            value = gain(map_.reshape(side, side).numpy(), case.scene, case.shape)
            gains.setdefault(name, []).append(value)
    return {name: good(values) for name, values in gains.items()}


def _definitions(
    reader: Any, seen: torch.Tensor, ids: torch.Tensor
) -> Iterator[tuple[str, torch.Tensor]]:
    seen.requires_grad_()
    logit, attention = _read(reader, seen, ids)
    gradients = torch.autograd.grad(logit, [*attention, seen])
    for number, (looked, gradient) in enumerate(zip(attention, gradients, strict=False)):
        layer = f"layer {number + 1} of {len(attention)}"
        yield f"attention, {layer}", _mean(looked)
        yield f"gradient x attention, {layer}", _mean((looked * gradient).relu())
        yield f"the same, averaged before ReLU, {layer}", _mean(looked * gradient).relu()
    yield "gradient x features", (gradients[-1] * seen).sum(-1).relu()[0, 1:].detach()
    yield "size of the features' gradient", gradients[-1].norm(dim=-1)[0, 1:]
    with torch.no_grad():
        kept = [_without(seen, patch) for patch in range(1, seen.shape[1])]
        lost = torch.stack([logit - _read(reader, each, ids)[0] for each in kept])
    yield "loss of the logit without a patch", lost.relu().detach()


def _read(reader: Any, seen: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, Any]:
    """The match logit, and the queries' attention to the image."""
    queries = reader.query_tokens
    read = reader.qformer(
        query_embeds=reader.embeddings(input_ids=ids, query_embeds=queries),
        query_length=queries.shape[1],
        encoder_hidden_states=seen,
        output_attentions=True,
    )
    match = reader.itm_head(read.last_hidden_state[:, : queries.shape[1]]).mean(dim=1)
    return match[0, 1], read.cross_attentions


def _mean(looked: torch.Tensor) -> torch.Tensor:
    return looked.mean(dim=(1, 2))[0, 1:].detach()


def _without(seen: torch.Tensor, patch: int) -> torch.Tensor:
    return torch.cat([seen[:, :patch], seen[:, patch + 1 :]], dim=1)


def main() -> None:
    """Prints the figures of docs/heat-maps.md."""
    parser = argparse.ArgumentParser("python -m benchmarks.heatmaps", description=__doc__)
    parser.add_argument("--scenes", type=int, default=300)
    asked = cases(parser.parse_args().scenes)
    model = Blip2.load(str(demo.OPT), str(demo.ITM), dtype="float32")
    found = measured(model, asked)
    print(
        f"maps of texts: {found.texts:.1%} good, median {found.median_text:.1f} times the area",
        flush=True,
    )
    print(
        f"maps of words: {found.words:.1%} good, median {found.median_word:.1f} times the area",
        flush=True,
    )
    for name, share in sorted(others(model, asked).items(), key=lambda each: -each[1]):
        print(f"  {share:6.1%} {name}")


if __name__ == "__main__":
    main()
