"""One more token per row through the layers of T5's decoder, as ``opt_step`` does for OPT.

Its position bias is per row here, which the model's own decoder cannot express: it has one distance
for all rows, and one token for each.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from blipq_worker.blip2.decoding.views import View, through

Layer = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True)
class _Block:
    """The parts of a block, in the order in which a token passes them."""

    norm: Layer
    query: Layer
    key: Layer
    value: Layer
    out: Layer
    cross_norm: Layer
    cross_query: Layer
    cross_out: Layer
    feed: Layer

    @classmethod
    def of(cls, block: Any) -> "_Block":
        own, cross = block.layer[0], block.layer[1]
        return cls(
            norm=own.layer_norm.forward,
            query=own.SelfAttention.q.forward,
            key=own.SelfAttention.k.forward,
            value=own.SelfAttention.v.forward,
            out=own.SelfAttention.o.forward,
            cross_norm=cross.layer_norm.forward,
            cross_query=cross.EncDecAttention.q.forward,
            cross_out=cross.EncDecAttention.o.forward,
            feed=block.layer[2].forward,
        )


class T5Step:
    """The step of transformers' ``T5ForConditionalGeneration`` (modeling_t5.py).

    Not in fp16, in which the model clamps what overflows: blipq runs T5 in bf16 then.
    """

    def __init__(self, model: Any) -> None:
        self._decoder = model.decoder
        self._blocks = [_Block.of(block) for block in model.decoder.block]
        self._head: Layer = model.lm_head.forward
        own = model.decoder.block[0].layer[0].SelfAttention
        self._attention, self._heads = own, own.n_heads
        scaled = model.config.scale_decoder_outputs
        self._scale: float = model.config.d_model**-0.5 if scaled else 1.0

    def __call__(self, tokens: torch.Tensor, views: Sequence[View]) -> torch.Tensor:
        """Scores, (rows, vocabulary), of what follows each row's token.

        tokens: (rows,), in the order of the views, which take in what is written.
        """
        shape = len(tokens), self._heads, -1
        states: torch.Tensor = self._decoder.embed_tokens.forward(tokens)
        for index, block in enumerate(self._blocks):
            normed = block.norm(states)
            query, key, value = (
                part(normed).view(shape) for part in (block.query, block.key, block.value)
            )
            states = states + block.out(through(views, index, query, key, value))
            query = block.cross_query(block.cross_norm(states)).view(shape)
            states = states + block.cross_out(through(views, index, query))
            states = block.feed(states)
        return self.scores(states)

    def scores(self, states: torch.Tensor) -> torch.Tensor:
        """What the states behind the last layer, (rows, hidden), say of the next tokens."""
        return self._head(self._decoder.final_layer_norm.forward(states) * self._scale)

    def position_bias(self, distances: torch.Tensor) -> torch.Tensor:
        """What distances to columns, (rows, columns), add to scores, (rows, heads, 1, columns)."""
        own = self._attention
        buckets = own._relative_position_bucket(
            distances,
            bidirectional=False,
            num_buckets=own.relative_attention_num_buckets,
            max_distance=own.relative_attention_max_distance,
        )
        bias: torch.Tensor = own.relative_attention_bias(buckets).permute(0, 2, 1)[:, :, None]
        return bias
