"""The files beside the weights: the base's, adapted to the LAVIS file."""

import copy
import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from blipq_worker.blip2.loading.checkpoints import Description
from blipq_worker.conversion.contents import Contents, ConversionError
from blipq_worker.conversion.weights import Shapes

#: Of tokenizers and processors, as transformers writes them and as hubs have them.
_COPIED = (
    *("generation_config.json", "processor_config.json", "preprocessor_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "spiece.model", "tokenizer.model"),
)
_WIDEST = 2048  # pixels; BLIP-2 was published for 224 and 364


def fitted(description: Description, shapes: Shapes, contents: Contents) -> Any:
    """The base's configuration with the file's sizes. shapes: by LAVIS's names.

    Raises ConversionError.
    """
    config = copy.deepcopy(description.config)
    vision = config.vision_config
    vision.image_size = _side(vision, shapes, contents.model)
    vision.layer_norm_eps = 1e-6  # that of LAVIS's blocks; some configurations say 1e-5
    if "query_tokens" in shapes:
        config.num_query_tokens = shapes["query_tokens"][1]
    if "vision_proj.weight" in shapes:
        config.image_text_hidden_size = shapes["vision_proj.weight"][0]
    return config


def _side(vision: Any, shapes: Shapes, model: Mapping[str, Any]) -> int:
    """The image size in pixels: by the file's position embeddings, else by what LAVIS was given."""
    patch, side = vision.patch_size, model.get("image_size", vision.image_size)
    if "visual_encoder.pos_embed" in shapes:
        side = math.sqrt(shapes["visual_encoder.pos_embed"][1] - 1) * patch
    if side not in range(patch, _WIDEST, patch):
        raise ConversionError(
            f"the file's images would be {side} pixels wide, which are no whole patches of {patch}"
        )
    return int(side)


def write_description(description: Description, config: Any, folder: Path) -> None:
    """Writes the configuration, the processor and the tokenizer beside the weights."""
    for name in _COPIED:
        if (description.folder / name).is_file():
            shutil.copyfile(description.folder / name, folder / name)
    for name in ("processor_config.json", "preprocessor_config.json"):
        if (folder / name).is_file():
            _fit_processor(folder / name, config)
    config.save_pretrained(folder)


def _fit_processor(file: Path, config: Any) -> None:
    found = json.loads(file.read_text("utf-8"))
    images = found.get("image_processor", found)
    if "size" in images:
        side = config.vision_config.image_size
        images["size"] = {"height": side, "width": side}
    if "num_query_tokens" in found:
        found["num_query_tokens"] = config.num_query_tokens
    file.write_text(json.dumps(found, indent=2) + "\n", "utf-8")
