"""The forward passes of OPT, Llama and T5 for sequences of all lengths, and for beams beside them.

All begin with a prefill, which fills caches of its own and gives the scores of each prompt's first
token; when all has gone well, the caches are put into slots. Then come steps of one token per row:
a sequence alone is a row, and a group of beams as many rows as it has beams (``views``).
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, Protocol

import torch
from transformers import DynamicCache
from transformers.cache_utils import EncoderDecoderCache

from blipq_worker.blip2.adapters.layers import rows_of
from blipq_worker.blip2.decoding.groups import BeamStep
from blipq_worker.blip2.decoding.kv_cache import Slots, round_up
from blipq_worker.blip2.decoding.llama_step import LlamaStep
from blipq_worker.blip2.decoding.opt_step import OptStep
from blipq_worker.blip2.decoding.sequences import Row
from blipq_worker.blip2.decoding.t5_step import T5Step
from blipq_worker.blip2.decoding.views import (
    COLUMNS,
    Alone,
    Places,
    Together,
    View,
    Where,
    width_of,
)
from blipq_worker.blip2.loading.attention import beam_attention, bias_of, next_token_attention

#: Slots of one kind of rows: self-attention's, and T5's cross attention's.
Pool = tuple[Slots, ...]


class Language(ABC):
    """A language model and the slots of what runs. alone, groups: of sequences, and of beams."""

    #: What penalties count as written before a row's first token.
    start: tuple[int, ...] = ()

    def __init__(self, model: Any, layers: int, kinds: int) -> None:
        """kinds: of attention with slots of their own."""
        self._model = model
        self._adapters = rows_of(model)
        self.alone: Pool = tuple(Slots(layers) for _ in range(kinds))
        self.groups: Pool = tuple(Slots(layers) for _ in range(kinds))
        self._attend = next_token_attention(model.config._attn_implementation)
        self._attend_beams = beam_attention(model.config._attn_implementation)

    @property
    def slots(self) -> Pool:
        return (*self.alone, *self.groups)

    @abstractmethod
    def first(self, row: Row) -> int:
        """The column of its first new token in self-attention."""

    @abstractmethod
    def columns(self, row: Row) -> int:
        """Columns that a row takes when it has reached its longest."""

    def own_columns(self, row: Row) -> int:
        """The same of self-attention alone. A last token is never read, and takes none."""
        return self.first(row) + row.params.num_beams * (row.params.max_new_tokens - 1)

    def prefill(self, rows: Sequence[Row]) -> tuple[torch.Tensor, Any]:
        """Scores of the first tokens, (rows, vocabulary), and what ``put`` needs."""
        queries = torch.stack([row.queries for row in rows])
        longest = max(len(row.ids) for row in rows)
        ids = [row.ids + [0] * (longest - len(row.ids)) for row in rows]
        prompts = torch.tensor(ids, dtype=torch.long, device=queries.device)
        lengths = torch.tensor([row.prompt_length for row in rows], device=queries.device)
        with self._adapters.listed([row.adapter for row in rows], queries.device):
            return self.read(queries, prompts, lengths)

    def read(
        self, queries: torch.Tensor, ids: torch.Tensor, lengths: torch.Tensor
    ) -> tuple[torch.Tensor, Any]:
        """The same of queries, (rows, 32, hidden), and ids, (rows, longest), with gaps at the end.

        lengths: of both together, (rows,).
        """
        prompts = self._model.get_input_embeddings()(ids)
        return self._read(torch.cat([queries, prompts], dim=1), lengths)

    @abstractmethod
    def _read(self, embeds: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, Any]:
        """Reads embedded prompts, (rows, longest, hidden)."""

    @abstractmethod
    def put(
        self, pool: Pool, running: Sequence[Row], rows: Sequence[Row], filled: Any, part: slice
    ) -> None:
        """Puts prefilled rows, ``part`` of what was filled, behind the running ones of a pool."""

    def step(self, alone: Sequence[Row], where: Where, beams: BeamStep | None) -> torch.Tensor:
        """Scores of the next tokens, (rows, vocabulary), of sequences, then of beams.

        where: the slots of the sequences. May be taken again.
        """
        parts = [] if beams is None else [self._of_beams(beams)]
        if alone:
            parts.insert(0, self._of_sequences(alone, where))
        with self._adapted(alone, beams):
            return self._step(parts)

    def _adapted(
        self, alone: Sequence[Row], beams: BeamStep | None
    ) -> AbstractContextManager[None]:
        """A pass over the rows of a step, with their adapters."""
        if not self._adapters.loaded:
            return nullcontext()
        numbers = [row.adapter for row in alone]
        for group in [] if beams is None else beams.groups:
            numbers += [group.row.adapter] * group.beams
        return self._adapters.listed(numbers, self._model.get_input_embeddings().weight.device)

    @abstractmethod
    def _step(self, parts: Sequence["Part"]) -> torch.Tensor:
        """Scores of these rows, (rows, vocabulary)."""

    def _of_sequences(self, rows: Sequence[Row], where: Where) -> "Part":
        device = rows[0].queries.device
        at = [self.first(row) + len(row.tokens) - 1 for row in rows]
        columns = torch.tensor(at, device=device)
        width = width_of(max(at) + 1, self.alone[0].columns)
        seen = torch.arange(width, device=device) <= columns[:, None]
        distances = torch.arange(width, device=device) - columns[:, None]
        bias = self._bias(seen[:, None], distances, self.alone[0].dtype)
        own = Places(self.alone[0].buffers, where, bias, self._attend)
        slots = torch.arange(len(at), device=device) if isinstance(where, slice) else where
        view = Alone(own, slots, columns, self._cross(self.alone, where, rows))
        tokens = torch.tensor([row.tokens[-1] for row in rows], device=device)
        return Part(tokens, columns, view)

    def _of_beams(self, step: BeamStep) -> "Part":
        rows = [group.row for group in step.groups]
        width = min(round_up(step.seen.shape[2], COLUMNS), self.groups[0].columns)
        seen = torch.nn.functional.pad(step.seen, (0, width - step.seen.shape[2]))
        bias = self._bias(seen, step.distances(width), self.groups[0].dtype)
        own = Places(self.groups[0].buffers, step.where, bias, self._attend_beams)
        cross = self._cross(self.groups, step.where, rows)
        view = Together(own, step.slots, step.columns, step.lanes, step.row, cross)
        return Part(step.tokens, step.positions, view)

    def _bias(
        self, seen: torch.Tensor, distances: torch.Tensor, dtype: torch.dtype
    ) -> torch.Tensor:
        """What is added to scores of self-attention, (slots, 1 or heads, beams, columns).

        seen: (slots, beams, columns). distances: to the columns, (slots, columns).
        """
        return bias_of(seen, dtype)

    def _cross(self, pool: Pool, where: Where, rows: Sequence[Row]) -> Places | None:
        """Where cross attention reads the prompts of these rows."""
        return None


class Part(NamedTuple):
    """Rows of a step. tokens, positions: (rows,), the last tokens, and where they are."""

    tokens: torch.Tensor
    positions: torch.Tensor
    view: View


class CausalStep(Protocol):
    """A step of one token per row by a model's own weights; see ``OptStep``."""

    def __call__(
        self, tokens: torch.Tensor, positions: torch.Tensor, views: Sequence[View]
    ) -> torch.Tensor:
        """Scores of what follows, (rows, vocabulary)."""


class Causal(Language):
    """Queries and prompt are the beginning of the text; positions count from it.

    decoder: what reads embeddings; of it the scores are the model's ``lm_head``.
    """

    def __init__(self, model: Any, decoder: Any, own: CausalStep) -> None:
        super().__init__(model, model.config.num_hidden_layers, 1)
        self._decoder = decoder
        self._own = own

    def first(self, row: Row) -> int:
        return row.prompt_length

    def columns(self, row: Row) -> int:
        return self.own_columns(row)

    def _read(self, embeds: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, Any]:
        """Gaps are at the end, where nobody looks: attention is causal, so it needs no mask."""
        cache = DynamicCache(config=self._model.config)
        hidden = self._decoder(inputs_embeds=embeds, cache=cache, use_cache=True).last_hidden_state
        last = hidden[torch.arange(len(hidden), device=hidden.device), lengths - 1]
        return self._model.lm_head(last), cache

    def put(
        self, pool: Pool, running: Sequence[Row], rows: Sequence[Row], filled: Any, part: slice
    ) -> None:
        columns = max(self.columns(row) for row in [*running, *rows])
        pool[0].put(len(running), filled, part, columns)

    def _step(self, parts: Sequence[Part]) -> torch.Tensor:
        tokens, positions = (torch.cat(each) for each in list(zip(*parts, strict=True))[:2])
        return self._own(tokens, positions, [part.view for part in parts])


class Llama(Causal):
    """Llama, Vicuna among them: positions are rotations of queries and keys."""

    def __init__(self, model: Any) -> None:
        own = LlamaStep(model)
        super().__init__(model, model.model, own)
        self._for_each_head = own.for_each_head

    def _read(self, embeds: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, Any]:
        scores, cache = super()._read(embeds, lengths)
        for layer in cache.layers:
            layer.keys = self._for_each_head(layer.keys)
            layer.values = self._for_each_head(layer.values)
        return scores, cache


class Opt(Causal):
    """OPT, by transformers' decoder where that is compiled."""

    def __init__(self, model: Any) -> None:
        super().__init__(model, model.model.decoder, OptStep(model))
        self._suits = OptStep.suits(model)

    def step(self, alone: Sequence[Row], where: Where, beams: BeamStep | None) -> torch.Tensor:
        if self._suits or not alone:
            return super().step(alone, where, beams)
        with self._adapted(alone, None):
            scores = self._by_the_model(alone, where)
        return scores if beams is None else torch.cat([scores, super().step([], where, beams)])

    def _by_the_model(self, rows: Sequence[Row], where: Where) -> torch.Tensor:
        """A step of transformers' decoder, which may be compiled; it knows no groups."""
        (slots,), device = self.alone, rows[0].queries.device
        at = [self.first(row) + len(row.tokens) - 1 for row in rows]
        positions = torch.tensor(at, device=device)
        slots.look(where, positions, max(at) + 1)
        seen = torch.arange(max(at) + 1, device=device) <= positions[:, None]
        tokens = torch.tensor([row.tokens[-1] for row in rows], device=device)
        hidden = self._decoder(
            input_ids=tokens[:, None],
            attention_mask=self._mask(seen),
            position_ids=positions[:, None],
            cache=slots.cache,
            use_cache=True,
        ).last_hidden_state
        scores: torch.Tensor = self._model.lm_head(hidden[:, -1])
        return scores

    def _mask(self, seen: torch.Tensor) -> torch.Tensor:
        # Flash attention takes out what is not seen; the others add to its scores.
        flash = "flash" in self._model.config._attn_implementation
        return seen if flash else bias_of(seen, self.alone[0].dtype)


class T5(Language):
    """Queries and prompt go to the encoder; the decoder begins with a start token."""

    def __init__(self, model: Any) -> None:
        super().__init__(model, model.config.num_decoder_layers, 2)
        self._own = T5Step(model)
        start = model.generation_config.decoder_start_token_id
        self.start = (model.config.decoder_start_token_id if start is None else start,)

    def first(self, row: Row) -> int:
        return 1

    def columns(self, row: Row) -> int:
        return row.prompt_length + self.own_columns(row)

    def _read(self, embeds: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, Any]:
        """The encoder's pass, then the decoder's first step, which fills both caches."""
        model, seen = self._model, torch.arange(embeds.shape[1], device=embeds.device)
        # With a two-dimensional mask transformers would wait for the GPU to check whether it masks.
        mask = bias_of(seen < lengths[:, None], embeds.dtype)
        encoded = model.encoder(inputs_embeds=embeds, attention_mask=mask).last_hidden_state
        caches = EncoderDecoderCache(DynamicCache(), DynamicCache())
        tokens = torch.full_like(lengths, self.start[0])[:, None]
        hidden = model.decoder.embed_tokens(tokens)
        own, cross = self._own.position_bias(torch.zeros_like(tokens)), mask.to(hidden.dtype)
        for block in model.decoder.block:
            hidden, own, cross = block(hidden, None, own, encoded, None, cross, cache=caches)
        return self._own.scores(hidden[:, -1]), caches

    def put(
        self, pool: Pool, running: Sequence[Row], rows: Sequence[Row], filled: Any, part: slice
    ) -> None:
        own, cross = pool
        everyone = [*running, *rows]
        longest = max(self.own_columns(row) for row in everyone)
        own.put(len(running), filled.self_attention_cache, part, longest)
        widest = max(row.prompt_length for row in everyone)
        cross.put(len(running), filled.cross_attention_cache, part, widest)

    def _step(self, parts: Sequence[Part]) -> torch.Tensor:
        return self._own(torch.cat([part.tokens for part in parts]), [part.view for part in parts])

    def _bias(
        self, seen: torch.Tensor, distances: torch.Tensor, dtype: torch.dtype
    ) -> torch.Tensor:
        bias = self._own.position_bias(distances)
        return bias + bias_of(seen, bias.dtype)

    def _cross(self, pool: Pool, where: Where, rows: Sequence[Row]) -> Places:
        device, width = rows[0].queries.device, max(row.prompt_length for row in rows)
        lengths = torch.tensor([row.prompt_length for row in rows], device=device)
        width = width_of(width, pool[1].columns)
        seen = torch.arange(width, device=device) < lengths[:, None]
        attend = self._attend if pool is self.alone else self._attend_beams
        return Places(pool[1].buffers, where, bias_of(seen, pool[1].dtype), attend)


def language_of(model: Any) -> Language:
    """How a language model of transformers runs here."""
    if model.config.is_encoder_decoder:
        return T5(model)
    return Llama(model) if model.config.model_type == "llama" else Opt(model)
