"""LAVIS's BLIP-2 in plain operations on tensors, and its files.

An independent reading of lavis/models/eva_vit.py and lavis/models/blip2_models/ (Qformer.py,
blip2_qformer.py, blip2_opt.py, blip2_t5.py). A state is a dictionary of weights under LAVIS's
names.
"""

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoConfig, OPTForCausalLM, T5ForConditionalGeneration

from worker.tiny_models import QUERIES, WIDTH

State = dict[str, Tensor]

LAYERS, HEADS, PATCH, EMBEDDED = 2, 4, 14, 16


def random_state(kind: str, base: Path, *, side: int, seed: int = 0) -> State:
    """A whole model of random weights; ``base``: a folder that has its other sizes."""
    torch.manual_seed(seed)
    config = AutoConfig.from_pretrained(base)
    state = {
        **_tower(side),
        **_qformer(config.qformer_config.vocab_size, words=kind == "retrieval"),
    }
    if kind == "retrieval":
        state |= {"temp": torch.tensor(0.07)}
        state |= _linear("itm_head", WIDTH, 2)
        state |= _linear("vision_proj", WIDTH, EMBEDDED) | _linear("text_proj", WIDTH, EMBEDDED)
        return state | _linear("Qformer.cls.predictions.transform.dense", WIDTH, WIDTH)
    state |= _linear(f"{kind}_proj", WIDTH, WIDTH)
    network = language_model(kind, base)
    for name, weight in network.named_parameters():
        if "norm" not in name:  # T5's own start is so large that it knows no doubt
            torch.nn.init.normal_(weight, std=0.15)
    return state | {f"{kind}_model.{name}": each for name, each in network.state_dict().items()}


def language_model(kind: str, base: Path) -> Any:
    """A language model of the base's configuration; LAVIS takes it from transformers, too."""
    network: Any = OPTForCausalLM if kind == "opt" else T5ForConditionalGeneration
    return network(AutoConfig.from_pretrained(base).text_config).eval()


#: Weights of frozen models that LAVIS's runner does not find among their parameters, where each
#: has one name, and so does not drop.
TIED = (
    "opt_model.lm_head.weight",
    *(f"t5_model.{part}.embed_tokens.weight" for part in ("encoder", "decoder")),
)


def trained(state: State, *, tower: bool = False) -> State:
    """What LAVIS's runner saves: no language model, but for TIED; the tower where it was tuned."""
    frozen = ("opt_model.", "t5_model.", *(() if tower else ("visual_encoder.",)))
    return {
        name: each for name, each in state.items() if name in TIED or not name.startswith(frozen)
    }


def tuned(state: State, seed: int = 1) -> State:
    """The state after training, with the frozen parts as they were."""
    torch.manual_seed(seed)
    changed = {
        name: each + 0.05 * torch.randn(each.shape)
        for name, each in trained(state).items()
        if each.is_floating_point() and name not in TIED
    }
    return state | changed


def save(file: Path, state: State, **model: Any) -> Path:
    """A file as LAVIS's runner writes it, after a step of a real optimizer."""
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight])
    weight.sum().backward()
    optimizer.step()
    torch.save(
        {
            "model": state,
            "optimizer": optimizer.state_dict(),
            "config": {"run": {"task": "captioning"}, "model": {"arch": "blip2", **model}},
            "scaler": torch.amp.GradScaler("cpu").state_dict(),
            "epoch": 4,
        },
        file,
    )
    return file


def pixels(picture: Image.Image, side: int) -> Tensor:
    """LAVIS's ``blip_image_eval``: (1, 3, side, side)."""
    resized = picture.convert("RGB").resize((side, side), Image.Resampling.BICUBIC)
    values = torch.from_numpy(np.array(resized)).permute(2, 0, 1) / 255
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
    deviation = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]
    return ((values - mean) / deviation)[None]


def seen(state: State, images: Tensor) -> Tensor:
    """``ln_vision(visual_encoder(images))``: (B, patches + 1, width)."""
    patches = F.conv2d(
        images,
        state["visual_encoder.patch_embed.proj.weight"],
        state["visual_encoder.patch_embed.proj.bias"],
        stride=PATCH,
    )
    first = state["visual_encoder.cls_token"].expand(len(images), -1, -1)
    x = torch.cat([first, patches.flatten(2).transpose(1, 2)], dim=1)
    x = x + state["visual_encoder.pos_embed"]
    for block in range(LAYERS):
        at = f"visual_encoder.blocks.{block}"
        queries, values = state[f"{at}.attn.q_bias"], state[f"{at}.attn.v_bias"]
        bias = torch.cat([queries, torch.zeros_like(queries), values])
        both = F.linear(_norm(state, f"{at}.norm1", x, 1e-6), state[f"{at}.attn.qkv.weight"], bias)
        x = x + _apply(state, f"{at}.attn.proj", _attention(*both.chunk(3, dim=-1)))
        hidden = F.gelu(_apply(state, f"{at}.mlp.fc1", _norm(state, f"{at}.norm2", x, 1e-6)))
        x = x + _apply(state, f"{at}.mlp.fc2", hidden)
    return _norm(state, "ln_vision", x, 1e-5)


def read(
    state: State,
    image: Tensor | None,
    ids: Tensor | None = None,
    *,
    queries: bool = True,
    looked: list[Tensor] | None = None,
) -> Tensor:
    """``Qformer.bert``'s last states, (B, queries + tokens, width).

    looked: takes the attention to the image, layer by layer.
    """
    parts = []
    if queries:
        assert image is not None
        parts.append(state["query_tokens"].expand(len(image), -1, -1))
    if ids is not None:
        words = state["Qformer.bert.embeddings.word_embeddings.weight"][ids]
        places = state["Qformer.bert.embeddings.position_embeddings.weight"][: ids.shape[1]]
        parts.append(words + places)
    count = parts[0].shape[1] if queries else 0
    x = _norm(state, "Qformer.bert.embeddings.LayerNorm", torch.cat(parts, dim=1))
    for layer in range(LAYERS):
        at = f"Qformer.bert.encoder.layer.{layer}"
        x = _attended(state, f"{at}.attention", x, x)
        asked, text = x[:, :count], x[:, count:]
        if queries:
            if layer % 2 == 0:
                assert image is not None
                asked = _attended(state, f"{at}.crossattention", asked, image, looked)
            asked = _fed(state, at, "_query", asked)
        if ids is not None:
            text = _fed(state, at, "", text)
        x = torch.cat([asked, text], dim=1)
    return x


def matched(state: State, image: Tensor, ids: Tensor, looked: list[Tensor] | None = None) -> Tensor:
    """The two logits of the matching head, (B, 2)."""
    asked = read(state, image, ids, looked=looked)[:, :QUERIES]
    return _apply(state, "itm_head", asked).mean(dim=1)


def cosine(state: State, image: Tensor, ids: Tensor) -> Tensor:
    """The contrastive head's score, (B,)."""
    left = F.normalize(_apply(state, "vision_proj", read(state, image)), dim=-1)
    text = read(state, None, ids, queries=False)[:, 0]
    right = F.normalize(_apply(state, "text_proj", text), dim=-1)
    return (left @ right[:, :, None]).squeeze(-1).amax(dim=-1)


def projected(kind: str, state: State, image: Tensor) -> Tensor:
    """What the language model sees of the image: (B, queries, width)."""
    return _apply(state, f"{kind}_proj", read(state, image))


def _tower(side: int) -> State:
    patches = (side // PATCH) ** 2
    at = "visual_encoder"
    state = {
        f"{at}.cls_token": torch.randn(1, 1, WIDTH) * 0.3,
        f"{at}.pos_embed": torch.randn(1, patches + 1, WIDTH) * 0.3,
        f"{at}.patch_embed.proj.weight": torch.randn(WIDTH, 3, PATCH, PATCH) * 0.1,
        f"{at}.patch_embed.proj.bias": torch.randn(WIDTH) * 0.1,
        **_layer_norm("ln_vision"),
    }
    for block in range(LAYERS):
        to = f"{at}.blocks.{block}"
        state |= _layer_norm(f"{to}.norm1") | _layer_norm(f"{to}.norm2")
        state |= _linear(f"{to}.attn.proj", WIDTH, WIDTH)
        state |= _linear(f"{to}.mlp.fc1", WIDTH, 128) | _linear(f"{to}.mlp.fc2", 128, WIDTH)
        state[f"{to}.attn.qkv.weight"] = torch.randn(3 * WIDTH, WIDTH) * 0.15
        for bias in ("q_bias", "v_bias"):
            state[f"{to}.attn.{bias}"] = torch.randn(WIDTH) * 0.1
    return state


def _qformer(vocabulary: int, *, words: bool) -> State:
    at = "Qformer.bert"
    state = {"query_tokens": torch.randn(1, QUERIES, WIDTH) * 0.5}
    state |= _layer_norm(f"{at}.embeddings.LayerNorm")
    state[f"{at}.embeddings.position_ids"] = torch.arange(64)[None]
    if words:
        state[f"{at}.embeddings.word_embeddings.weight"] = torch.randn(vocabulary, WIDTH) * 0.3
        state[f"{at}.embeddings.position_embeddings.weight"] = torch.randn(64, WIDTH) * 0.3
    for layer in range(LAYERS):
        to = f"{at}.encoder.layer.{layer}"
        for kind in ("attention", *(("crossattention",) if layer % 2 == 0 else ())):
            for part in ("self.query", "self.key", "self.value", "output.dense"):
                state |= _linear(f"{to}.{kind}.{part}", WIDTH, WIDTH)
            state |= _layer_norm(f"{to}.{kind}.output.LayerNorm")
        for which in ("_query", *(("",) if words else ())):
            state |= _linear(f"{to}.intermediate{which}.dense", WIDTH, 128)
            state |= _linear(f"{to}.output{which}.dense", 128, WIDTH)
            state |= _layer_norm(f"{to}.output{which}.LayerNorm")
    return state


def _linear(name: str, given: int, made: int) -> State:
    return {
        f"{name}.weight": torch.randn(made, given) * 0.15,
        f"{name}.bias": torch.randn(made) * 0.1,
    }


def _layer_norm(name: str) -> State:
    return {
        f"{name}.weight": 1 + torch.randn(WIDTH) * 0.1,
        f"{name}.bias": torch.randn(WIDTH) * 0.1,
    }


def _apply(state: State, name: str, x: Tensor) -> Tensor:
    return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])


def _norm(state: State, name: str, x: Tensor, eps: float = 1e-12) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)


def _attention(
    queries: Tensor, keys: Tensor, values: Tensor, looked: list[Tensor] | None = None
) -> Tensor:
    q, k, v = (each.unflatten(-1, (HEADS, -1)).transpose(1, 2) for each in (queries, keys, values))
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    attention = scores.softmax(dim=-1)
    if looked is not None:
        looked.append(attention)
    return (attention @ v).transpose(1, 2).flatten(2)


def _attended(
    state: State, at: str, x: Tensor, other: Tensor, looked: list[Tensor] | None = None
) -> Tensor:
    queries = _apply(state, f"{at}.self.query", x)
    keys, values = (_apply(state, f"{at}.self.{part}", other) for part in ("key", "value"))
    states = _attention(queries, keys, values, looked)
    dense = _apply(state, f"{at}.output.dense", states)
    return _norm(state, f"{at}.output.LayerNorm", dense + x)


def _fed(state: State, at: str, which: str, x: Tensor) -> Tensor:
    hidden = F.gelu(_apply(state, f"{at}.intermediate{which}.dense", x))
    dense = _apply(state, f"{at}.output{which}.dense", hidden)
    return _norm(state, f"{at}.output{which}.LayerNorm", dense + x)


#: From transformers' names to LAVIS's, one after the other.
_BACK = (
    (r"^vision_model\.embeddings\.class_embedding", "visual_encoder.cls_token"),
    (r"^vision_model\.embeddings\.position_embedding", "visual_encoder.pos_embed"),
    (r"^vision_model\.embeddings\.patch_embedding", "visual_encoder.patch_embed.proj"),
    (r"^vision_model\.post_layernorm", "ln_vision"),
    (r"^vision_model\.encoder\.layers", "visual_encoder.blocks"),
    (r"\.layer_norm(\d)", r".norm\1"),
    (r"\.self_attn\.qkv", ".attn.qkv"),
    (r"\.self_attn\.projection", ".attn.proj"),
    (r"^embeddings", "Qformer.bert.embeddings"),
    (r"^qformer\.(?:embeddings\.)?layernorm", "Qformer.bert.embeddings.LayerNorm"),
    (r"^qformer\.embeddings", "Qformer.bert.embeddings"),
    (r"^qformer\.encoder", "Qformer.bert.encoder"),
    (r"attention\.attention", "attention.self"),
    (r"^vision_projection", "vision_proj"),
    (r"^text_projection", "text_proj"),
    (r"^language_projection", "opt_proj"),
    (r"^language_model", "opt_model"),
)


def as_lavis(weights: State) -> State:
    """A checkpoint of transformers under LAVIS's names."""
    state = {}
    for name, each in weights.items():
        renamed = name
        for pattern, other in _BACK:
            renamed = re.sub(pattern, other, renamed)
        if renamed.endswith("attn.qkv.bias"):
            queries, _, values = each.chunk(3)
            at = renamed.removesuffix("qkv.bias")
            state |= {f"{at}q_bias": queries.clone(), f"{at}v_bias": values.clone()}
        else:
            state[renamed] = each
    return state
