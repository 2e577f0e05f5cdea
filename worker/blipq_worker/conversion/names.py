"""LAVIS's names of weights, and transformers' names for the same."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

_LAYER = r"vision_model.encoder.layers.\1"

#: From patterns of LAVIS's names to transformers' names. The first that fits a whole name counts.
_NAMES = [
    (re.compile(pattern), name)
    for pattern, name in (
        (r"visual_encoder\.cls_token", r"vision_model.embeddings.class_embedding"),
        (r"visual_encoder\.pos_embed", r"vision_model.embeddings.position_embedding"),
        (
            r"visual_encoder\.patch_embed\.proj\.(.+)",
            r"vision_model.embeddings.patch_embedding.\1",
        ),
        (r"visual_encoder\.blocks\.(\d+)\.norm([12])\.(.+)", rf"{_LAYER}.layer_norm\2.\3"),
        (r"visual_encoder\.blocks\.(\d+)\.attn\.qkv\.weight", rf"{_LAYER}.self_attn.qkv.weight"),
        (r"visual_encoder\.blocks\.(\d+)\.attn\.[qv]_bias", rf"{_LAYER}.self_attn.qkv.bias"),
        (r"visual_encoder\.blocks\.(\d+)\.attn\.proj\.(.+)", rf"{_LAYER}.self_attn.projection.\2"),
        (r"visual_encoder\.blocks\.(\d+)\.mlp\.(.+)", rf"{_LAYER}.mlp.\2"),
        (r"ln_vision\.(.+)", r"vision_model.post_layernorm.\1"),
        (r"Qformer\.bert\.embeddings\.LayerNorm\.(.+)", r"qformer.layernorm.\1"),
        (r"Qformer\.bert\.embeddings\.((?:word|position)_embeddings\..+)", r"embeddings.\1"),
        (
            r"Qformer\.bert\.encoder\.(layer\.\d+\.(?:cross)?attention)\.self\.(.+)",
            r"qformer.encoder.\1.attention.\2",
        ),
        (r"Qformer\.bert\.encoder\.(.+)", r"qformer.encoder.\1"),
        (r"(query_tokens|itm_head\..+)", r"\1"),
        (r"(vision|text)_proj\.(.+)", r"\1_projection.\2"),
        (r"(?:opt|t5)_proj\.(.+)", r"language_projection.\1"),
        (r"(?:opt|t5)_model\.(.+)", r"language_model.\1"),
    )
]

#: What LAVIS has and serving does not need: the temperature of a loss, the Q-Former's own captions,
#: and numbers that count positions.
_LEFT_OUT = re.compile(r"temp|Qformer\.cls\..+|.+\.position_ids")

QKV_BIAS = ".self_attn.qkv.bias"


@dataclass(frozen=True, slots=True)
class Renamed:
    """LAVIS's names, sorted out.

    sources: transformers' names, each with the names of what it is made of: one, but for a bias of
    the tower's attention, which is made of those of queries and values. left_out: nothing that is
    served takes them. unknown: no name of LAVIS's models of this kind.
    """

    sources: dict[str, list[str]]
    left_out: list[str]
    unknown: list[str]


def renamed(names: Iterable[str], taken: Iterable[str]) -> Renamed:
    """Sorts out LAVIS's names. taken: transformers' names of all that the model has."""
    room = set(taken)
    found = Renamed({}, [], [])
    for name in sorted(names):
        other = _renamed(name)
        if other is not None and other in room:
            found.sources.setdefault(other, []).append(name)
        elif _LEFT_OUT.fullmatch(name):
            found.left_out.append(name)
        else:
            found.unknown.append(name)
    return found


def _renamed(name: str) -> str | None:
    for pattern, other in _NAMES:
        if match := pattern.fullmatch(name):
            return match.expand(other)
    return None
