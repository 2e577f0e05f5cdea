"""Phase 1: the vision model, taught what is in every cell of the grid."""

import logging

import torch
from tools.demo_model import architecture
from tools.demo_model.data import BUILD, Pictures, normalized
from tools.demo_model.optimization import batches, mixed_precision, optimize, parameter_groups
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import Blip2VisionModel

from blipq_worker.demo import world

LOG = logging.getLogger(__name__)
SAVED = BUILD / "vision.pt"
STEPS = 5000
BATCH = 64
PEAK = 1.5e-3

CELLS = 9
KIND_CLASSES = len(world.KINDS) + 1  # class 0: no shape
COLOR_CLASSES = len(world.COLORS) + 1
_CELL_OF_ROW = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2])  # of the patch rows, and of the columns
PATCH_CELLS = (3 * _CELL_OF_ROW[:, None] + _CELL_OF_ROW[None, :]).flatten()
_PRESENCE_WEIGHT = 4.0  # most cells are empty


class Labels:
    """What to predict of each scene, as class numbers."""

    def __init__(self, scenes: list[world.Scene]) -> None:
        self.kinds = torch.zeros(len(scenes), CELLS, dtype=torch.long)
        self.colors = torch.zeros(len(scenes), CELLS, dtype=torch.long)
        for row, scene in enumerate(scenes):
            for shape in scene.shapes:
                cell = 3 * shape.row + shape.column
                self.kinds[row, cell] = 1 + world.KINDS.index(shape.kind)
                self.colors[row, cell] = 1 + world.COLORS.index(shape.color)
        self.backgrounds = torch.tensor([world.BACKGROUNDS.index(s.background) for s in scenes])
        self.counts = torch.tensor([len(s.shapes) for s in scenes])


class Heads(nn.Module):
    """Linear readings of the vision model that exist only while it is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.Linear(architecture.WIDTH, KIND_CLASSES + COLOR_CLASSES)
        self.whole = nn.Linear(architecture.WIDTH, len(world.BACKGROUNDS) + len(world.NUMBERS))

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(batch, 65, width) to kinds and colours by patch, backgrounds and counts."""
        kinds, colors = self.cell(hidden[:, 1:]).split([KIND_CLASSES, COLOR_CLASSES], -1)
        backgrounds, counts = self.whole(hidden[:, 0]).split(
            [len(world.BACKGROUNDS), len(world.NUMBERS)], -1
        )
        return kinds, colors, backgrounds, counts


def _class_weights(classes: int) -> Tensor:
    weights = torch.full((classes,), _PRESENCE_WEIGHT)
    weights[0] = 1.0
    return weights


def train(training: Pictures, validation: Pictures, steps: int = STEPS) -> Blip2VisionModel:
    """A vision model that knows the scenes, rounded to the precision it is stored with."""
    torch.manual_seed(0)
    model, heads, labels = architecture.vision_model(), Heads(), Labels(training.scenes)
    order = batches(len(training), BATCH, torch.Generator().manual_seed(0))
    forward = torch.compile(lambda pixels: model(pixels).last_hidden_state)

    def losses(step: int) -> dict[str, Tensor]:
        rows = next(order)
        with mixed_precision():
            hidden = forward(normalized(training.pixels[rows]))
            kinds, colors, backgrounds, counts = heads(hidden)
        return {
            "kind": _patch_loss(kinds, labels.kinds[rows]),
            "color": _patch_loss(colors, labels.colors[rows]),
            "background": 0.3 * cross_entropy(backgrounds.float(), labels.backgrounds[rows]),
            "count": 0.3 * cross_entropy(counts.float(), labels.counts[rows]),
        }

    def checkpoint(step: int) -> None:
        LOG.info("scene-exact %.4f", scene_accuracy(model, heads, validation))
        torch.save(model.state_dict(), SAVED)

    optimize(parameter_groups(model, heads), losses, steps, PEAK, checkpoint)
    return load()


def load() -> Blip2VisionModel:
    """The trained vision model with its weights rounded to float16 values."""
    model = architecture.vision_model()
    model.load_state_dict({k: v.half().float() for k, v in torch.load(SAVED).items()})
    return model.eval().requires_grad_(False)


def _patch_loss(logits: Tensor, cells: Tensor) -> Tensor:
    """Logits (batch, 64, classes) against class numbers (batch, 9)."""
    targets = cells[:, PATCH_CELLS].flatten()
    return cross_entropy(logits.float().flatten(0, 1), targets, _class_weights(logits.shape[-1]))


@torch.no_grad()
def scene_accuracy(model: Blip2VisionModel, heads: Heads, pictures: Pictures) -> float:
    """The share of scenes with every cell right, each cell read by all of its patches."""
    labels, right = Labels(pictures.scenes), 0
    for rows in torch.arange(len(pictures)).split(100):
        hidden = model(normalized(pictures.pixels[rows])).last_hidden_state
        kinds, colors, _, _ = heads(hidden)
        same = (_by_cell(kinds) == labels.kinds[rows]) & (_by_cell(colors) == labels.colors[rows])
        right += int(same.all(dim=1).sum())
    return right / len(pictures)


def _by_cell(logits: Tensor) -> Tensor:
    """(batch, 64, classes) to the class of each cell (batch, 9)."""
    sums = torch.zeros(len(logits), CELLS, logits.shape[-1])
    return sums.index_add_(1, PATCH_CELLS, logits.log_softmax(-1)).argmax(-1)


def features(model: Blip2VisionModel, pictures: Pictures) -> Tensor:
    """What the frozen vision model gives for all pictures: (scenes, 65, width), bfloat16.

    Kept beside the weights until those are newer.
    """
    kept = BUILD / f"features-{pictures.scenes[0].seed}-{len(pictures)}.pt"
    if not kept.exists() or kept.stat().st_mtime < SAVED.stat().st_mtime:
        torch.save(torch.cat([seen(model, part).bfloat16() for part in pictures.parts()]), kept)
    return torch.load(kept, mmap=True)


@torch.no_grad()
def seen(model: Blip2VisionModel, pixels: Tensor) -> Tensor:
    """Vision features (batch, 65, width) of pixels (batch, 3, side, side), uint8."""
    return model(normalized(pixels).to(model.dtype)).last_hidden_state
