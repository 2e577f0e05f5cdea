"""One more token per row through OPT's layers, with nothing around them.

transformers' decoder prepares masks, checks arguments and calls four modules deep at every layer,
which counts where a step has few rows (``python -m benchmarks steps``), and it knows no beams that
share a slot. The layers' own weights and code are used, whatever their precision; hooks on them are
not called.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from blipq_worker.blip2.decoding.views import View, through

Layer = Callable[[torch.Tensor], torch.Tensor]


def _nothing(states: torch.Tensor) -> torch.Tensor:
    return states


@dataclass(frozen=True, slots=True)
class _Block:
    """The parts of a layer, in the order in which a token passes them."""

    norm: Layer
    query: Layer
    key: Layer
    value: Layer
    out: Layer
    norm_after: Layer
    second_norm: Layer
    up: Layer
    activation: Layer
    down: Layer
    second_norm_after: Layer

    @classmethod
    def of(cls, layer: Any) -> "_Block":
        attention, before = layer.self_attn, layer.do_layer_norm_before
        norms = layer.self_attn_layer_norm.forward, layer.final_layer_norm.forward
        return cls(
            norm=norms[0] if before else _nothing,
            query=attention.q_proj.forward,
            key=attention.k_proj.forward,
            value=attention.v_proj.forward,
            out=attention.out_proj.forward,
            norm_after=_nothing if before else norms[0],
            second_norm=norms[1] if before else _nothing,
            up=layer.fc1.forward,
            activation=layer.activation_fn.forward,
            down=layer.fc2.forward,
            second_norm_after=_nothing if before else norms[1],
        )


class OptStep:
    """The step of transformers' ``OPTForCausalLM`` (modeling_opt.py)."""

    def __init__(self, model: Any) -> None:
        decoder = self._decoder = model.model.decoder
        self._blocks = [_Block.of(layer) for layer in decoder.layers]
        project_in, norm, project_out = (
            _nothing if part is None else part.forward
            for part in (decoder.project_in, decoder.final_layer_norm, decoder.project_out)
        )
        self._project_in: Layer = project_in
        self._norm: Layer = norm
        self._project_out: Layer = project_out
        self._head: Layer = model.lm_head.forward
        self._heads = model.config.num_attention_heads
        self._scaling: float = decoder.layers[0].self_attn.scaling

    @staticmethod
    def suits(model: Any) -> bool:
        """Whether it is built as the OPTs of BLIP-2 are, and is not compiled."""
        decoder, config = model.model.decoder, model.config
        plain = config.do_layer_norm_before and decoder.final_layer_norm is not None
        return plain and decoder.project_in is None and decoder._compiled_call_impl is None

    def __call__(
        self, tokens: torch.Tensor, positions: torch.Tensor, views: Sequence[View]
    ) -> torch.Tensor:
        """Scores, (rows, vocabulary), of what follows each row's token at its position.

        tokens, positions: (rows,), in the order of the views, which take in what is written.
        """
        shape = len(tokens), self._heads, -1
        states = self._embedded(tokens, positions)
        for index, block in enumerate(self._blocks):
            normed = block.norm(states)
            query = (block.query(normed) * self._scaling).view(shape)
            key, value = block.key(normed).view(shape), block.value(normed).view(shape)
            attended = through(views, index, query, key, value)
            states = block.norm_after(states + block.out(attended))
            raised = block.activation(block.up(block.second_norm(states)))
            states = block.second_norm_after(states + block.down(raised))
        return self._head(self._project_out(self._norm(states)))

    def _embedded(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        table = self._decoder.embed_positions
        embedded: torch.Tensor = self._project_in(self._decoder.embed_tokens.forward(tokens))
        placed: torch.Tensor = embedded + table.weight[positions + table.offset]
        return placed
