"""Llama over static slots: the prefill by the model, a step by its layers' own weights."""

from typing import Any

import torch

from blipq_worker.blip2.decoding.languages import Llama
from blipq_worker.blip2.decoding.llama_step import for_each_head, rotated
from blipq_worker.blip2.decoding.static.attention.methods import Attention
from blipq_worker.blip2.decoding.static.causal import StaticCausal
from blipq_worker.blip2.decoding.static.linears import (
    Pass,
    activation_of,
    fused,
    norm_of,
    pass_of,
)
from blipq_worker.blip2.decoding.static.state import SlotState


class StaticLlama(StaticCausal):
    """See ``StaticLanguage``."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._decoder = model.model
        self._layers = [_Layer(layer) for layer in self._decoder.layers]
        self._last_norm = norm_of(self._decoder.norm)
        attention = self._decoder.layers[0].self_attn
        self._scale: float = attention.scaling
        self._sharing: int = attention.num_key_value_groups
        super().__init__(
            model,
            Llama(model),
            layers=len(self._layers),
            heads=model.config.num_attention_heads,
            size=attention.head_dim,
        )

    @staticmethod
    def can_run(model: Any) -> bool:
        """Whether it is a Llama that is not compiled."""
        return model.config.model_type == "llama" and model.model._compiled_call_impl is None

    def reserve(self, slots: int, columns: int, device: torch.device) -> None:
        """Takes the memory of all slots. Raises OutOfMemoryError, and then has taken none."""
        super().reserve(slots, columns, device)
        like = torch.empty(0, dtype=self.dtype, device=device)
        places = torch.arange(columns, device=device)[None]
        cos, sin = self._decoder.rotary_emb(like, places)
        #: Of each position, for queries and keys of all heads: (columns, 1, 1, head size).
        self._cos, self._sin = cos[0][:, None, None], sin[0][:, None, None]

    def step(
        self,
        state: SlotState,
        attention: Attention,
        window: int,
        ancestry: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Scores of the next tokens, (n, vocabulary); see ``StaticLanguage``."""
        assert self._own is not None
        positions = state.positions
        cos, sin = self._cos[positions], self._sin[positions]
        states = self._decoder.embed_tokens.forward(state.tokens)
        prepared = attention.prepare(positions, window, self.dtype, None, ancestry)
        for layer, cache in zip(self._layers, self._own.layers, strict=True):
            parts = self._parts(layer.read(layer.norm(states)))
            new = torch.cat([rotated(parts[:, :2], cos, sin), parts[:, 2:]], dim=1)
            attended = attention(new, cache, prepared, self._scale)
            states = states + layer.out(attended.reshape(len(states), -1))
            states = layer.feed(states)
        scores: torch.Tensor = self._model.lm_head.forward(self._last_norm(states))
        return scores

    def _parts(self, read: torch.Tensor) -> torch.Tensor:
        """Queries, keys and values side by side to (n, 3, heads, head size)."""
        if self._sharing == 1:
            return read.view(len(read), 3, self.heads, self.size)
        alike = self.heads // self._sharing
        parts = read.view(len(read), -1, self.size)
        queries, keys, values = torch.split(parts, [self.heads, alike, alike], dim=1)
        shared = (for_each_head(part, self._sharing) for part in (keys, values))
        return torch.stack([queries, *shared], dim=1)


class _Layer:
    """The parts of a layer, in the order in which a token passes them."""

    def __init__(self, layer: Any) -> None:
        own, feed = layer.self_attn, layer.mlp
        self.norm: Pass = norm_of(layer.input_layernorm)
        self.read: Pass = fused([own.q_proj, own.k_proj, own.v_proj])
        self.out: Pass = pass_of(own.o_proj)
        self.second_norm: Pass = norm_of(layer.post_attention_layernorm)
        self.up: Pass = fused([feed.gate_proj, feed.up_proj])
        self.activation: Pass = activation_of(feed.act_fn)
        self.down: Pass = pass_of(feed.down_proj)

    def feed(self, states: torch.Tensor) -> torch.Tensor:
        opened, linear = self.up(self.second_norm(states)).chunk(2, dim=-1)
        return states + self.down(self.activation(opened) * linear)
