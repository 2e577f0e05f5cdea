"""One more token per row through OPT's layers, with nothing around them.

transformers' decoder prepares masks, checks arguments and calls four modules deep at every layer,
which counts where a step has few rows (``python -m benchmarks steps``). The layers' own weights and
code are used, whatever their precision; hooks on them are not called.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from blipq_worker.blip2.decoding.kv_cache import round_up
from blipq_worker.blip2.loading.attention import bias_of, next_token_attention

#: Columns that a step looks at are a multiple of this: vectors without a rest.
_COLUMNS = 16

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
    up: Layer
    activation: Layer
    down: Layer

    @classmethod
    def of(cls, layer: Any) -> "_Block":
        attention = layer.self_attn
        return cls(
            norm=layer.self_attn_layer_norm.forward,
            query=attention.q_proj.forward,
            key=attention.k_proj.forward,
            value=attention.v_proj.forward,
            out=attention.out_proj.forward,
            second_norm=layer.final_layer_norm.forward,
            up=layer.fc1.forward,
            activation=layer.activation_fn.forward,
            down=layer.fc2.forward,
        )


class OptStep:
    """The step of an OPT that ``suits``: transformers' ``OPTForCausalLM`` (modeling_opt.py)."""

    def __init__(self, model: Any) -> None:
        self._decoder = model.model.decoder
        self._blocks = [_Block.of(layer) for layer in self._decoder.layers]
        self._norm: Layer = self._decoder.final_layer_norm.forward
        self._head: Layer = model.lm_head.forward
        self._heads = model.config.num_attention_heads
        self._scaling: float = self._decoder.layers[0].self_attn.scaling
        self._attend = next_token_attention(model.config._attn_implementation)

    @staticmethod
    def suits(model: Any) -> bool:
        """Whether it is built as the OPTs of BLIP-2 are, and is not compiled."""
        decoder, config = model.model.decoder, model.config
        plain = config.do_layer_norm_before and decoder.final_layer_norm is not None
        return plain and decoder.project_in is None and decoder._compiled_call_impl is None

    def __call__(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        longest: int,
        where: slice | torch.Tensor,
        buffers: list[torch.Tensor],
    ) -> torch.Tensor:
        """Scores, (rows, vocabulary), of what follows each row's token at its position.

        tokens, positions: (rows,). longest: the highest position and one. where: the rows' slots in
        the buffers, each (2, slots, heads, columns, head size); keys and values are written there.
        """
        count = len(tokens)
        # Layers differ where memory ran out as they grew: the running rows fit into the smallest.
        width = _width(longest, min(buffer.shape[3] for buffer in buffers))
        seen = torch.arange(width, device=tokens.device) <= positions[:, None]
        bias = bias_of(seen, buffers[0].dtype)
        slots = torch.arange(count, device=tokens.device) if isinstance(where, slice) else where
        states = self._embedded(tokens, positions)
        for block, buffer in zip(self._blocks, buffers, strict=True):
            normed = block.norm(states)
            query = (block.query(normed) * self._scaling).view(count, self._heads, 1, -1)
            new = query.shape[0], self._heads, query.shape[3]
            keys, values = buffer
            keys[slots, :, positions] = block.key(normed).view(new)
            values[slots, :, positions] = block.value(normed).view(new)
            attended = self._attend(
                query, _part(keys, where, width), _part(values, where, width), bias
            )
            states = states + block.out(attended.reshape(count, -1))
            raised = block.activation(block.up(block.second_norm(states)))
            states = states + block.down(raised)
        return self._head(self._norm(states))

    def _embedded(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        table = self._decoder.embed_positions
        embedded: torch.Tensor = self._decoder.embed_tokens.forward(tokens)
        placed: torch.Tensor = embedded + table.weight[positions + table.offset]
        return placed


def _width(longest: int, columns: int) -> int:
    """How many columns a step looks at: all, where a copy of the rest would cost as much."""
    width = round_up(longest, _COLUMNS)
    return columns if columns < 1.4 * width else width


def _part(states: torch.Tensor, where: slice | torch.Tensor, width: int) -> torch.Tensor:
    """The first columns of some slots; a view of all of them as far as that can be."""
    return states[where] if width == states.shape[2] else states[where, :, :width]
