"""OPT over static slots: the prefill by the model, a step by its layers' own weights."""

from typing import Any

import torch

from blipq_worker.blip2.decoding.languages import Opt
from blipq_worker.blip2.decoding.opt_step import OptStep
from blipq_worker.blip2.decoding.static.attention.methods import Attention
from blipq_worker.blip2.decoding.static.causal import StaticCausal
from blipq_worker.blip2.decoding.static.linears import Pass, fused, pass_of
from blipq_worker.blip2.decoding.static.state import SlotState


class StaticOpt(StaticCausal):
    """See ``StaticLanguage``. For an OPT that it ``can_run``."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._decoder = model.model.decoder
        self._layers = [_Layer(layer) for layer in self._decoder.layers]
        attention = self._decoder.layers[0].self_attn
        self._scale: float = attention.scaling
        super().__init__(
            model,
            Opt(model),
            layers=len(self._layers),
            heads=attention.num_heads,
            size=attention.head_dim,
        )

    @staticmethod
    def can_run(model: Any) -> bool:
        """Whether it is built as the OPTs of BLIP-2 are, and is not compiled."""
        return model.config.model_type == "opt" and OptStep.suits(model)

    def step(
        self,
        state: SlotState,
        attention: Attention,
        window: int,
        ancestry: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Scores of the next tokens, (n, vocabulary); see ``StaticLanguage``."""
        assert self._own is not None
        positions, table = state.positions, self._decoder.embed_positions
        states = self._decoder.embed_tokens.forward(state.tokens)
        states = states + table.weight[positions + table.offset]
        prepared = attention.prepare(positions, window, self.dtype, None, ancestry)
        for layer, cache in zip(self._layers, self._own.layers, strict=True):
            new = layer.read(layer.norm(states)).view(len(states), 3, self.heads, self.size)
            attended = attention(new, cache, prepared, self._scale)
            states = states + layer.out(attended.reshape(len(states), -1))
            raised = layer.activation(layer.up(layer.second_norm(states)))
            states = states + layer.down(raised)
        scores: torch.Tensor = self._model.lm_head.forward(self._decoder.final_layer_norm(states))
        return scores


class _Layer:
    """The parts of a layer, in the order in which a token passes them."""

    def __init__(self, layer: Any) -> None:
        own = layer.self_attn
        self.norm: Pass = layer.self_attn_layer_norm.forward
        self.read: Pass = fused([own.q_proj, own.k_proj, own.v_proj])
        self.out: Pass = pass_of(own.out_proj)
        self.second_norm: Pass = layer.final_layer_norm.forward
        self.up: Pass = pass_of(layer.fc1)
        self.activation: Pass = layer.activation_fn.forward
        self.down: Pass = pass_of(layer.fc2)
