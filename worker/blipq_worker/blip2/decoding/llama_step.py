"""One more token per row through Llama's layers, as ``opt_step`` does for OPT."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from blipq_worker.blip2.decoding.views import View, through

Layer = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True)
class _Block:
    """The parts of a layer, in the order in which a token passes them."""

    norm: Layer
    query: Layer
    key: Layer
    value: Layer
    out: Layer
    second_norm: Layer
    feed: Layer

    @classmethod
    def of(cls, layer: Any) -> "_Block":
        attention = layer.self_attn
        return cls(
            norm=layer.input_layernorm.forward,
            query=attention.q_proj.forward,
            key=attention.k_proj.forward,
            value=attention.v_proj.forward,
            out=attention.o_proj.forward,
            second_norm=layer.post_attention_layernorm.forward,
            feed=layer.mlp.forward,
        )


class LlamaStep:
    """The step of transformers' ``LlamaForCausalLM`` (modeling_llama.py).

    Its slots have keys and values for each head, also where heads share them: no published
    InstructBLIP has such, and all attention to slots is the same code.
    """

    def __init__(self, model: Any) -> None:
        decoder = self._decoder = model.model
        self._blocks = [_Block.of(layer) for layer in decoder.layers]
        self._head: Layer = model.lm_head.forward
        attention = decoder.layers[0].self_attn
        self._size: int = attention.head_dim
        self._sharing: int = attention.num_key_value_groups
        self._scaling: float = attention.scaling

    def __call__(
        self, tokens: torch.Tensor, positions: torch.Tensor, views: Sequence[View]
    ) -> torch.Tensor:
        """Scores, (rows, vocabulary), of what follows each row's token at its position.

        tokens, positions: (rows,), in the order of the views, which take in what is written.
        """
        shape = len(tokens), -1, self._size
        states: torch.Tensor = self._decoder.embed_tokens.forward(tokens)
        # (1, rows, size) each; the same for all heads.
        cos, sin = (part[0][:, None] for part in self._decoder.rotary_emb(states, positions[None]))
        for index, block in enumerate(self._blocks):
            normed = block.norm(states)
            query, key, value = (
                part(normed).view(shape) for part in (block.query, block.key, block.value)
            )
            query = rotated(query, cos, sin) * self._scaling
            key = self.for_each_head(rotated(key, cos, sin))
            attended = through(views, index, query, key, self.for_each_head(value))
            states = states + block.out(attended)
            states = states + block.feed(block.second_norm(states))
        return self._head(self._decoder.norm.forward(states))

    def for_each_head(self, states: torch.Tensor) -> torch.Tensor:
        """Keys or values, (rows, heads that share them, ...), for each head."""
        return for_each_head(states, self._sharing)


def rotated(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Queries or keys, (..., size), turned by the angles of their positions."""
    first, second = states.chunk(2, dim=-1)
    return states * cos + torch.cat([-second, first], dim=-1) * sin


def for_each_head(states: torch.Tensor, sharing: int) -> torch.Tensor:
    """Keys or values, (rows, heads, ...), once for each of the heads that share them."""
    if sharing == 1:
        return states
    shape = len(states), states.shape[1], sharing, *states.shape[2:]
    return states[:, :, None].expand(shape).flatten(1, 2)
