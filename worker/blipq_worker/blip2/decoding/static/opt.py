"""OPT over static slots: the prefill by the model, a step by its layers' own weights."""

from typing import Any

import torch

from blipq_worker.blip2.adapters.layers import rows_of
from blipq_worker.blip2.decoding.languages import Opt
from blipq_worker.blip2.decoding.opt_step import OptStep
from blipq_worker.blip2.decoding.sequences import Row
from blipq_worker.blip2.decoding.static.attention.caches import KeysAndValues
from blipq_worker.blip2.decoding.static.attention.methods import Attention
from blipq_worker.blip2.decoding.static.linears import Pass, fused, pass_of
from blipq_worker.blip2.decoding.static.state import SlotState


class StaticOpt:
    """See ``StaticLanguage``. For an OPT that it ``can_run``."""

    start: tuple[int, ...] = ()

    def __init__(self, model: Any) -> None:
        self._model = model
        self.rows = rows_of(model)
        self._growing = Opt(model)
        self._decoder = model.model.decoder
        self._layers = [_Layer(layer) for layer in self._decoder.layers]
        attention = self._decoder.layers[0].self_attn
        self.heads, self.size = attention.num_heads, attention.head_dim
        self._scale: float = attention.scaling
        self.vocabulary: int = model.get_input_embeddings().weight.shape[0]
        self.dtype: torch.dtype = model.get_input_embeddings().weight.dtype
        self.longest: int = model.config.max_position_embeddings
        self._own: KeysAndValues | None = None
        self.columns = self.prompt_columns = 0

    @staticmethod
    def can_run(model: Any) -> bool:
        """Whether it is built as the OPTs of BLIP-2 are, and is not compiled."""
        return not model.config.is_encoder_decoder and OptStep.suits(model)

    def suits(self, row: Row) -> bool:
        """Whether a slot holds a sequence at its longest."""
        return row.prompt_length + row.params.max_new_tokens - 1 <= self.prompt_columns

    def first_position(self, row: Row) -> int:
        """Where its first new token goes."""
        return row.prompt_length

    def slot_bytes(self, columns: int) -> int:
        """What keys and values of one slot take."""
        return KeysAndValues.bytes_of(len(self._layers), self.heads, columns, self.size, self.dtype)

    def reserve(self, slots: int, columns: int, device: torch.device) -> None:
        """Takes the memory of all slots. Raises OutOfMemoryError, and then has taken none."""
        self._own = KeysAndValues(
            len(self._layers), slots, self.heads, columns, self.size, self.dtype, device
        )
        self.columns = self.prompt_columns = columns

    def release(self) -> None:
        """Gives the memory of all slots back."""
        self._own = None

    @property
    def bytes(self) -> int:
        """What keys and values take."""
        return 0 if self._own is None else self._own.bytes

    def prefill(
        self, queries: torch.Tensor, ids: torch.Tensor, lengths: torch.Tensor
    ) -> tuple[torch.Tensor, Any, torch.Tensor]:
        """Reads prompts by the model; see ``StaticLanguage``."""
        scores, cache = self._growing.read(queries, ids, lengths)
        return scores, cache, lengths - 1

    def put(self, at: torch.Tensor, filled: Any, lengths: torch.Tensor, *, clear: bool) -> None:
        """Puts prefilled sequences into the first of their slots; see ``StaticLanguage``."""
        assert self._own is not None
        if clear:
            self._own.clear(at[:, 1:])
        self._own.put(
            at[:, :1], [(layer.keys, layer.values) for layer in filled.layers], clear=clear
        )

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
