"""The forward passes of OPT and T5 for rows of all lengths.

Both begin with a prefill, which fills caches of its own and gives the scores of each row's first
token; when all has gone well, the caches are put into slots. Then come steps of one token per row.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import Cache, EncoderDecoderCache
from transformers.models.t5.modeling_t5 import T5Attention

from blipq_worker.blip2.decoding.kv_cache import Slots
from blipq_worker.blip2.decoding.opt_step import OptStep
from blipq_worker.blip2.decoding.sequences import Row
from blipq_worker.blip2.loading.attention import bias_of

#: Slots of the rows of a step: all that run, or some of them.
Where = slice | torch.Tensor


class Language(ABC):
    """A language model and the slots of its running rows."""

    #: What penalties count as written before a row's first token.
    start: tuple[int, ...] = ()

    @abstractmethod
    def columns(self, row: Row) -> int:
        """Columns that a row takes when it has reached its longest."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def prefill(self, rows: Sequence[Row]) -> tuple[torch.Tensor, Any]:
        """Scores of the first tokens, (rows, vocabulary), and what ``put`` needs."""
        queries = torch.stack([row.queries for row in rows])
        longest = max(len(row.ids) for row in rows)
        ids = [row.ids + [0] * (longest - len(row.ids)) for row in rows]
        prompts = torch.tensor(ids, dtype=torch.long, device=queries.device)
        lengths = torch.tensor([row.prompt_length for row in rows], device=queries.device)
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
    def put(self, running: Sequence[Row], rows: Sequence[Row], filled: Any) -> None:
        """Puts prefilled rows into the slots behind the running ones."""

    @abstractmethod
    def step(self, rows: Sequence[Row], where: Where) -> torch.Tensor:
        """Scores of the next tokens, (rows, vocabulary); may be taken again."""

    @property
    @abstractmethod
    def slots(self) -> tuple[Slots, ...]: ...


class Opt(Language):
    """Queries and prompt are the beginning of the text; positions count from it."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self._slots = Slots(model.config.num_hidden_layers)
        self._own = OptStep(model) if OptStep.suits(model) else None

    @property
    def slots(self) -> tuple[Slots, ...]:
        return (self._slots,)

    def columns(self, row: Row) -> int:
        return row.prompt_length + row.params.max_new_tokens - 1

    def _read(self, embeds: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, Any]:
        """Gaps are at the end, where nobody looks: attention is causal, so it needs no mask."""
        cache = DynamicCache(config=self._model.config)
        decoder = self._model.model.decoder
        hidden = decoder(inputs_embeds=embeds, cache=cache, use_cache=True).last_hidden_state
        last = hidden[torch.arange(len(hidden), device=hidden.device), lengths - 1]
        return self._model.lm_head(last), cache

    def put(self, running: Sequence[Row], rows: Sequence[Row], filled: Any) -> None:
        columns = max(self.columns(row) for row in [*running, *rows])
        self._slots.put(len(running), filled, columns)

    def step(self, rows: Sequence[Row], where: Where) -> torch.Tensor:
        device = rows[0].queries.device
        at = [row.prompt_length + len(row.tokens) - 1 for row in rows]
        tokens, longest = _last_tokens(rows), max(at) + 1
        positions = torch.tensor(at, device=device)
        if self._own is not None:
            return self._own(tokens, positions, longest, where, self._slots.buffers)
        self._slots.look(where, positions, longest)
        seen = torch.arange(longest, device=device) <= positions[:, None]
        hidden = self._model.model.decoder(
            input_ids=tokens[:, None],
            attention_mask=self._mask(seen),
            position_ids=positions[:, None],
            cache=self._slots.cache,
            use_cache=True,
        ).last_hidden_state
        scores: torch.Tensor = self._model.lm_head(hidden[:, -1])
        return scores

    def _mask(self, seen: torch.Tensor) -> torch.Tensor:
        # Flash attention takes out what is not seen; the others add to its scores.
        flash = "flash" in self._model.config._attn_implementation
        return seen if flash else bias_of(seen, self._slots.dtype)


class T5(Language):
    """Queries and prompt go to the encoder; the decoder begins with a start token.

    Its position bias is per row here, which the model's own decoder cannot express (it has one
    distance for all rows): so the blocks are called one by one.
    """

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self._own, self._cross = (Slots(model.config.num_decoder_layers) for _ in range(2))
        start = model.generation_config.decoder_start_token_id
        self.start = (model.config.decoder_start_token_id if start is None else start,)

    @property
    def slots(self) -> tuple[Slots, ...]:
        return self._own, self._cross

    def columns(self, row: Row) -> int:
        return row.prompt_length + row.params.max_new_tokens

    def _read(self, embeds: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, Any]:
        """The encoder's pass, then the decoder's first step, which fills both caches."""
        seen = torch.arange(embeds.shape[1], device=embeds.device) < lengths[:, None]
        # Of a mask with two dimensions transformers asks whether it hides anything, and waits.
        mask = bias_of(seen, embeds.dtype)
        encoded = self._model.encoder(inputs_embeds=embeds, attention_mask=mask).last_hidden_state
        caches = EncoderDecoderCache(DynamicCache(), DynamicCache())
        first = torch.zeros_like(lengths)
        tokens = torch.full_like(lengths, self.start[0])
        return self._decode(tokens, first, 1, encoded, seen, caches), caches

    def put(self, running: Sequence[Row], rows: Sequence[Row], filled: Any) -> None:
        everyone = [*running, *rows]
        longest = max(row.params.max_new_tokens for row in everyone)
        self._own.put(len(running), filled.self_attention_cache, longest)
        widest = max(row.prompt_length for row in everyone)
        self._cross.put(len(running), filled.cross_attention_cache, widest)

    def step(self, rows: Sequence[Row], where: Where) -> torch.Tensor:
        device = rows[0].queries.device
        at = [len(row.tokens) for row in rows]
        positions = torch.tensor(at, device=device)
        lengths = torch.tensor([row.prompt_length for row in rows], device=device)
        width = max(row.prompt_length for row in rows)
        self._own.look(where, positions, max(at) + 1)
        self._cross.look(where, positions, width)
        seen = torch.arange(width, device=device) < lengths[:, None]
        # Of what was encoded only the keys and values are needed, and the cross cache has them.
        encoded = torch.empty((len(rows), width, 0), device=device)
        caches = EncoderDecoderCache(self._own.cache, self._cross.cache)
        return self._decode(_last_tokens(rows), positions, max(at) + 1, encoded, seen, caches)

    def _decode(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        length: int,
        encoded: torch.Tensor,
        seen: torch.Tensor,
        caches: Cache,
    ) -> torch.Tensor:
        """One token per row, (rows,), at its position; ``seen`` of the encoder, (rows, width)."""
        decoder = self._model.decoder
        hidden = decoder.embed_tokens(tokens[:, None])
        own, cross = self._position_bias(positions, length), bias_of(seen, hidden.dtype)
        for block in decoder.block:
            hidden, own, cross = block(hidden, None, own, encoded, None, cross, cache=caches)
        hidden = decoder.final_layer_norm(hidden)[:, -1]
        if self._model.config.scale_decoder_outputs:
            hidden = hidden * self._model.config.d_model**-0.5
        scores: torch.Tensor = self._model.lm_head(hidden)
        return scores

    def _position_bias(self, positions: torch.Tensor, length: int) -> torch.Tensor:
        """What each row's distances add to its scores, (rows, heads, 1, length); no future."""
        attention: T5Attention = self._model.decoder.block[0].layer[0].SelfAttention
        distances = torch.arange(length, device=positions.device) - positions[:, None]
        buckets = attention._relative_position_bucket(
            distances,
            bidirectional=False,
            num_buckets=attention.relative_attention_num_buckets,
            max_distance=attention.relative_attention_max_distance,
        )
        bias = attention.relative_attention_bias(buckets).permute(0, 2, 1)[:, :, None]
        biased: torch.Tensor = bias + bias_of(distances <= 0, bias.dtype)
        return biased


def _last_tokens(rows: Sequence[Row]) -> torch.Tensor:
    return torch.tensor([row.tokens[-1] for row in rows], device=rows[0].queries.device)
