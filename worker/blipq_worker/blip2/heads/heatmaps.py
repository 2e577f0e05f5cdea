"""Where the matching head looked: maps of an image, for a text and for each of its words.

In BLIP-2's Q-Former the queries attend to the image, and words do not. A text's map is the gradient
of the match logit by the queries' attention, times that attention, in the last layer that attends
to the image: Grad-CAM, as LAVIS draws it for ALBEF. What speaks against a match is left out, the
rest is the mean over heads and queries. A word's map is what the text's map loses when the word is
not attended to. ``python -m benchmarks.heatmaps`` compares this with other definitions.

What serves jobs computes no gradients: its layers are packed, and its tensors are of inference
mode. So maps have fp32 weights of their own, of the Q-Former and the matching head, read when the
first map is needed. Of a checkpoint in S3 they are kept from the start: its keys are dropped before
the first job. The vision tower is the served one.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import safe_open
from transformers import Blip2ForImageTextRetrieval

from blipq_worker.blip2.heads.embedding import Arrays
from blipq_worker.blip2.loading.checkpoints import Checkpoint
from blipq_worker.blip2.text.padding import padded
from blipq_worker.blip2.text.tokens import Texts
from blipq_worker.blip2.vision.features import Vision
from blipq_worker.blip2.vision.preprocessing import Pixels

#: Texts, whole or without a word, in one pass: each keeps its states until the gradient is known.
_AT_ONCE = 16


@dataclass(frozen=True, slots=True, eq=False)
class ExplainItem:
    """One image and the texts to draw maps for, as the caller wrote them."""

    pixels: Pixels
    texts: tuple[str, ...]


class Explainer:
    """Draws maps with a retrieval checkpoint. Not thread-safe.

    own: its weights where its files cannot be read again; see ``own_weights``.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        texts: Texts,
        vision: Vision,
        own: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        self._checkpoint = checkpoint
        self._own = own
        self._texts = texts
        self._vision = vision
        self._weights: Any = None
        #: Called after each pass: many texts are no hung head.
        self.on_step: Callable[[], None] = lambda: None

    def explain(self, items: Sequence[ExplainItem]) -> list[Arrays]:
        """Per item, for the number of each text ("0", ...), maps of (1 + words, rows, columns).

        The first is the text's, the others its words', as far as the head reads it. Each is fp32
        from 0 to 1, its highest value; all 0 where nothing speaks for a match.
        """
        with torch.inference_mode():
            seen = self._vision.patches([item.pixels for item in items])
        images = seen.clone().float()  # what autograd keeps must not be of inference mode
        return [self._maps(image, item.texts) for image, item in zip(images, items, strict=True)]

    def _maps(self, image: torch.Tensor, texts: Sequence[str]) -> Arrays:
        variants = [row for text in texts for row in self._variants(text)]
        found = []
        for start in range(0, len(variants), _AT_ONCE):
            found.append(self._looked(image, variants[start : start + _AT_ONCE]))
            self.on_step()
        side = round((image.shape[0] - 1) ** 0.5)
        maps = iter(torch.cat(found).view(-1, side, side))
        drawn = {}
        for number, text in enumerate(texts):
            whole = next(maps)
            words = [
                (whole - next(maps)).relu() if word else torch.zeros_like(whole)
                for word in self._texts.words(text)
            ]
            drawn[str(number)] = torch.stack([_scaled(each) for each in (whole, *words)])
        return {name: each.cpu().numpy() for name, each in drawn.items()}

    def _variants(self, text: str) -> Iterator[tuple[list[int], range]]:
        """The text's ids, and which of them are left out: none, then those of each word."""
        ids = self._texts.ids(text)
        yield ids, range(0)
        yield from ((ids, word) for word in self._texts.words(text) if word)

    def _looked(self, image: torch.Tensor, variants: list[tuple[list[int], range]]) -> torch.Tensor:
        """A map for each text, (texts, patches)."""
        model = self._model(image.device)
        ids, mask = padded([row for row, _ in variants], self._texts.pad, image.device)
        for row, (_, left_out) in enumerate(variants):
            mask[row, left_out.start : left_out.stop] = 0
        with torch.inference_mode(False), torch.enable_grad():
            # The first thing that has a gradient; weights have none.
            queries = model.query_tokens.expand(len(ids), -1, -1).clone().requires_grad_()
            count = queries.shape[1]
            read = model.qformer(
                query_embeds=model.embeddings(input_ids=ids, query_embeds=queries),
                query_length=count,
                attention_mask=torch.cat([mask.new_ones(queries.shape[:2]), mask], dim=1),
                encoder_hidden_states=image.expand(len(ids), -1, -1),
                output_attentions=True,
            )
            match = model.itm_head(read.last_hidden_state[:, :count]).mean(dim=1)[:, 1]
            attention = read.cross_attentions[-1]  # (texts, heads, queries, 1 + patches)
            (gradient,) = torch.autograd.grad(match.sum(), attention)
        # The first column is the tower's own summary of the image, which has no place in it.
        maps: torch.Tensor = (attention.detach() * gradient).relu().mean(dim=(1, 2))[:, 1:]
        return maps

    def _model(self, device: torch.device) -> Any:
        if self._weights is None:
            with torch.inference_mode(False):
                self._weights = read_plain(self._checkpoint, device, self._own)
            self.on_step()
        return self._weights


def own_weights(model: Any) -> dict[str, torch.Tensor]:
    """What maps need of a loaded retrieval model that is not packed yet: all but its tower.

    These parts are fp32 and never quantized, so they are what its files hold. They are shared with
    the model, until packing gives that others.
    """
    state: dict[str, torch.Tensor] = model.state_dict()
    return {name: each for name, each in state.items() if not name.startswith("vision_model.")}


def read_plain(
    checkpoint: Checkpoint, device: torch.device, own: Mapping[str, torch.Tensor] | None = None
) -> Any:
    """The checkpoint without its tower: fp32, in transformers' plain layers and attention.

    own: its weights, where they are here already.
    """
    with torch.device("meta"):
        model = Blip2ForImageTextRetrieval._from_config(
            checkpoint.config, attn_implementation="eager"
        )
    del model.vision_model
    wanted = set(model.state_dict())
    if own is None:
        weights = _read(checkpoint, wanted, device)
    else:
        weights = {name: own[name].float() for name in wanted}
    model.load_state_dict(weights, assign=True)
    positions = model.embeddings.position_ids.shape[-1]
    model.embeddings.position_ids = torch.arange(positions, device=device)[None]
    return model.requires_grad_(False).eval()


def _read(
    checkpoint: Checkpoint, wanted: set[str], device: torch.device
) -> dict[str, torch.Tensor]:
    weights = {}
    for path, names in checkpoint.weights.items():
        with safe_open(path, framework="pt", device=str(device)) as file:
            for name in wanted & set(names or file.keys()):
                weights[name] = file.get_tensor(name).float()
    return weights


def _scaled(map_: torch.Tensor) -> torch.Tensor:
    return map_ / map_.max().clamp_min(torch.finfo(map_.dtype).tiny)
