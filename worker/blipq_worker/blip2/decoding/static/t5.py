"""T5 over static slots: a slot holds the keys and values of the prompt and of the new tokens."""

from typing import Any

import torch

from blipq_worker.blip2.adapters.layers import rows_of
from blipq_worker.blip2.decoding.languages import T5
from blipq_worker.blip2.decoding.sequences import Row
from blipq_worker.blip2.decoding.static.attention.caches import KeysAndValues
from blipq_worker.blip2.decoding.static.attention.methods import Attention
from blipq_worker.blip2.decoding.static.linears import (
    Pass,
    activation_of,
    fused,
    norm_of,
    pass_of,
)
from blipq_worker.blip2.decoding.static.state import SlotState


class StaticT5:
    """See ``StaticLanguage``. Half of a slot's columns are for the prompt, half for new tokens."""

    def __init__(self, model: Any) -> None:
        self._model, self._decoder = model, model.decoder
        self.rows = rows_of(model)
        self._growing = T5(model)
        self.start = self._growing.start
        self._layers = [_Layer(block) for block in self._decoder.block]
        self._last_norm = norm_of(self._decoder.final_layer_norm)
        own = self._decoder.block[0].layer[0].SelfAttention
        self.heads, self.size = own.n_heads, own.key_value_proj_dim
        embeddings = model.get_input_embeddings().weight
        self.vocabulary: int = embeddings.shape[0]
        self.dtype: torch.dtype = embeddings.dtype
        self.longest = 2 * 2048
        self.columns = self.prompt_columns = 0
        self._own: KeysAndValues | None = None
        self._cross: KeysAndValues | None = None

    @staticmethod
    def can_run(model: Any) -> bool:
        """Whether it is a T5 that is not compiled, in a type that it clamps nothing in."""
        if not model.config.is_encoder_decoder or model.decoder._compiled_call_impl is not None:
            return False
        return bool(model.get_input_embeddings().weight.dtype != torch.float16)

    def suits(self, row: Row) -> bool:
        """Whether a slot holds a sequence at its longest."""
        new = row.params.max_new_tokens
        return row.prompt_length <= self.prompt_columns and new <= self.columns

    def first_position(self, row: Row) -> int:
        """Where its first new token goes: behind the start token."""
        return 1

    def slot_bytes(self, columns: int) -> int:
        """What keys and values of one slot take."""
        layers = len(self._layers)
        return KeysAndValues.bytes_of(layers, self.heads, columns, self.size, self.dtype)

    def reserve(self, slots: int, columns: int, device: torch.device) -> None:
        """Takes the memory of all slots. Raises OutOfMemoryError, and then has taken none."""
        self.columns = columns // 2
        self.prompt_columns = columns - self.columns
        try:
            self._own = self._reserved(slots, self.columns, device)
            self._cross = self._reserved(slots, self.prompt_columns, device)
        except BaseException:
            self.release()
            raise
        self._lengths = torch.ones(slots, dtype=torch.long, device=device)
        self._bias = self._distance_bias(device)

    def _reserved(self, slots: int, columns: int, device: torch.device) -> KeysAndValues:
        shape = len(self._layers), slots, self.heads, columns, self.size
        return KeysAndValues(*shape, self.dtype, device)

    def _distance_bias(self, device: torch.device) -> torch.Tensor:
        """What each distance adds to scores: (heads, columns)."""
        own = self._decoder.block[0].layer[0].SelfAttention
        buckets = own._relative_position_bucket(
            -torch.arange(self.columns, device=device),
            bidirectional=False,
            num_buckets=own.relative_attention_num_buckets,
            max_distance=own.relative_attention_max_distance,
        )
        bias: torch.Tensor = own.relative_attention_bias(buckets).T.contiguous()
        return bias

    def release(self) -> None:
        """Gives the memory of all slots back."""
        self._own = self._cross = None

    @property
    def bytes(self) -> int:
        """What keys and values take."""
        return sum(part.bytes for part in (self._own, self._cross) if part is not None)

    def prefill(
        self, queries: torch.Tensor, ids: torch.Tensor, lengths: torch.Tensor
    ) -> tuple[torch.Tensor, Any, torch.Tensor]:
        """Reads prompts by the model, and the start token; see ``StaticLanguage``."""
        scores, caches = self._growing.read(queries, ids, lengths)
        return scores, caches, torch.zeros_like(lengths)

    def put(self, at: torch.Tensor, filled: Any, lengths: torch.Tensor, *, clear: bool) -> None:
        """Puts prefilled sequences into their slots: what the encoder read into each of them."""
        assert self._own is not None
        assert self._cross is not None
        if clear:
            self._own.clear(at[:, 1:])
        for mine, slots, cache in (
            (self._own, at[:, :1], filled.self_attention_cache),
            (self._cross, at, filled.cross_attention_cache),
        ):
            mine.put(slots, [(layer.keys, layer.values) for layer in cache.layers], clear=clear)
        self._lengths.index_copy_(0, at.flatten(), lengths[:, None].expand_as(at).flatten())

    def step(
        self,
        state: SlotState,
        attention: Attention,
        window: int,
        ancestry: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Scores of the next tokens, (n, vocabulary)."""
        assert self._own is not None
        assert self._cross is not None
        count = len(state.tokens)
        lengths = self._lengths[:count]
        states = self._decoder.embed_tokens.forward(state.tokens)
        prepared = attention.prepare(state.positions, window, self.dtype, self._bias, ancestry)
        mask = attention.prepare_cross(lengths, self.prompt_columns, self.dtype)
        layers = zip(self._layers, self._own.layers, self._cross.layers, strict=True)
        for layer, own, cross in layers:
            new = layer.read(layer.norm(states)).view(count, 3, self.heads, self.size)
            attended = attention(new, own, prepared, 1.0)
            states = states + layer.out(attended.reshape(count, -1))
            query = layer.cross_query(layer.cross_norm(states)).view(count, self.heads, self.size)
            attended = attention.cross(query, cross, mask)
            states = states + layer.cross_out(attended.reshape(count, -1))
            states = layer.feed(states)
        states = self._last_norm(states)
        if self._model.config.scale_decoder_outputs:
            states = states * self._model.config.d_model**-0.5
        scores: torch.Tensor = self._model.lm_head.forward(states)
        return scores


class _Layer:
    """The parts of a block, in the order in which a token passes them."""

    def __init__(self, block: Any) -> None:
        own, cross = block.layer[0], block.layer[1]
        self.norm: Pass = norm_of(own.layer_norm)
        part = own.SelfAttention
        self.read: Pass = fused([part.q, part.k, part.v])
        self.out: Pass = pass_of(part.o)
        self.cross_norm: Pass = norm_of(cross.layer_norm)
        self.cross_query: Pass = pass_of(cross.EncDecAttention.q)
        self.cross_out: Pass = pass_of(cross.EncDecAttention.o)
        last = block.layer[2]
        self.last_norm: Pass = norm_of(last.layer_norm)
        dense = last.DenseReluDense
        self.activation: Pass = activation_of(dense.act)
        self.gated = hasattr(dense, "wi_1")
        self.up: Pass = fused([dense.wi_0, dense.wi_1]) if self.gated else pass_of(dense.wi)
        self.down: Pass = pass_of(dense.wo)
        # Under 8 bits transformers keeps `wo` in fp32.
        self.down_type: torch.dtype | None = dense.wo.weight.dtype
        if not self.down_type.is_floating_point:
            self.down_type = None

    def feed(self, states: torch.Tensor) -> torch.Tensor:
        raised = self.up(self.last_norm(states))
        if self.gated:
            opened, linear = raised.chunk(2, dim=-1)
            raised = self.activation(opened) * linear
        else:
            raised = self.activation(raised)
        return states + self.down(raised.to(self.down_type or raised.dtype))
