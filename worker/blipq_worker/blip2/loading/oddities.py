"""Values of a configuration that differ from LAVIS's and change a model's answers.

Folders that people convert or fine-tune bring such numbers: they load without an error.
"""

from collections.abc import Iterator
from typing import Any

#: LayerNorm's epsilon by part of the configuration. OPT's is no number of a configuration.
_EPSILONS = {
    ("vision_config", "layer_norm_eps"): 1e-6,
    ("qformer_config", "layer_norm_eps"): 1e-12,
    ("text_config", "layer_norm_epsilon"): 1e-6,
}
#: Sides of the published checkpoints' pictures, in pixels, and the width of their vision tower.
_SIDES = (224, 364)
_VIT_G = 1408


def oddities(config: Any) -> Iterator[str]:
    """What a ``Blip2Config`` has otherwise than LAVIS, each in a sentence."""
    for (part, name), usual in _EPSILONS.items():
        found = getattr(getattr(config, part), name, None)
        if found is not None and found != usual:
            yield (
                f"{part}.{name} is {found:g}, where LAVIS computes with {usual:g}: unless it was "
                "trained so, its answers differ from those of its training"
            )
    vision = config.vision_config
    sides = vision.image_size
    side = sides if isinstance(sides, int) else sides[0]
    if vision.hidden_size == _VIT_G and side not in _SIDES:
        yield (
            f"vision_config.image_size is {side}, where BLIP-2's checkpoints have 224 or 364: it "
            "must be the size that its position embeddings were trained for"
        )
