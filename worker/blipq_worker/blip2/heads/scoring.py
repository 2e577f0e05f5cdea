"""How likely the language model finds each of the offered answers.

As LAVIS's ``predict_class`` has it for T5 and Llama (blip2_t5_instruct.py and
blip2_vicuna_instruct.py in lavis/models/blip2_models): the sum of the log-probabilities of an
answer's tokens, its end token included. For OPT LAVIS has no such method; here it is the same sum,
up to the line feed that ends a text in OPT's training.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from transformers.modeling_outputs import BaseModelOutput

from blipq.contract import ErrorCode
from blipq.errors import PermanentError
from blipq_worker.blip2.adapters.layers import rows_of
from blipq_worker.blip2.generation.generator import Generator
from blipq_worker.blip2.text.padding import padded
from blipq_worker.blip2.vision.preprocessing import Pixels

# But for T5 each pair of a prompt and a choice holds its own copy of the prompt's keys and values
# (about 15 MB for OPT-2.7b and a short question).
_PAIRS_AT_ONCE = 32
_IGNORED = -100


@dataclass(frozen=True, slots=True, eq=False)
class RankItem:
    """One image, the prompts that ask about it, and the answers that each may have.

    adapter: see ``adapters.layers.Rows``.
    """

    pixels: Pixels
    prompts: tuple[str, ...]
    choices: tuple[str, ...]
    adapter: int = 0


@dataclass(frozen=True, slots=True)
class _Prompt:
    """One prompt of an item, and the item's choices, as token ids.

    queries: the image as the language model reads it, (32, hidden).
    """

    queries: torch.Tensor
    ids: list[int]
    choices: list[list[int]]
    adapter: int


class Ranker:
    """Scores answers with a generation checkpoint. Not thread-safe, except for ``check``."""

    def __init__(self, generator: Generator) -> None:
        self._generator = generator
        self._language_model = generator.model.language_model
        self._adapters = rows_of(generator.model)
        self._score = self._score_t5 if generator.family == "t5" else self._score_causal
        #: Called after each chunk of pairs: a long batch is not a hung one.
        self.on_step: Callable[[], None] = lambda: None

    def check(self, prompts: Sequence[str], choices: Sequence[str]) -> None:
        """Raises PermanentError ``invalid_request`` for what does not fit. Thread-safe."""
        longest = max(len(self._generator.answer_ids(choice)) for choice in choices)
        room = self._generator.room(longest)
        count = max(len(self._generator.ids(prompt)) for prompt in prompts)
        if count > room:
            message = f"a prompt has {count:,} tokens, where its choices leave room for {room:,}"
            raise PermanentError(ErrorCode.INVALID_REQUEST, message)

    @torch.inference_mode()
    def rank(self, items: Sequence[RankItem]) -> list[list[list[float]]]:
        """For each item, for each of its prompts, the log-likelihood of each choice, in order.

        One pass of the vision tower per image. Neighbours do not change a number beyond rounding.
        """
        looks = self._generator.seen(items)
        prompts = [
            prompt
            for item, seen in zip(items, looks, strict=True)
            for prompt in self._prompts(item, seen)
        ]
        pairs = [(prompt, choice) for prompt in prompts for choice in prompt.choices]
        scores: list[float] = []
        for start in range(0, len(pairs), _PAIRS_AT_ONCE):
            scores += self._chunk(pairs[start : start + _PAIRS_AT_ONCE])
            self.on_step()
        found = iter(scores)
        return [[[next(found) for _ in item.choices] for _ in item.prompts] for item in items]

    def _prompts(self, item: RankItem, looks: Sequence[torch.Tensor]) -> list[_Prompt]:
        choices = [self._generator.answer_ids(choice) for choice in item.choices]
        return [
            _Prompt(queries, self._generator.ids(text), choices, item.adapter)
            for queries, text in zip(looks, item.prompts, strict=True)
        ]

    def _chunk(self, pairs: Sequence[tuple[_Prompt, list[int]]]) -> list[float]:
        """Log-likelihoods, one per pair. Each prompt is read once."""
        prompts = list({id(prompt): prompt for prompt, _ in pairs}.values())
        embeds, mask = self._generator.prefix(
            torch.stack([prompt.queries for prompt in prompts]), [prompt.ids for prompt in prompts]
        )
        numbers = {id(prompt): number for number, prompt in enumerate(prompts)}
        owners = torch.tensor([numbers[id(prompt)] for prompt, _ in pairs], device=mask.device)
        answers, answer_mask = padded([answer for _, answer in pairs], 0, mask.device)
        adapters = [prompt.adapter for prompt in prompts]
        of_pairs = [prompt.adapter for prompt, _ in pairs]
        device = mask.device
        logits = self._score(
            self._adapters.listed(adapters, device),
            self._adapters.listed(of_pairs, device),
            embeds,
            mask,
            owners,
            answers,
            answer_mask,
        )
        chances = logits.float().log_softmax(dim=-1).gather(-1, answers[..., None])[..., 0]
        return (chances * answer_mask).sum(dim=-1).tolist()

    def _score_causal(
        self,
        reading: AbstractContextManager[None],
        answering: AbstractContextManager[None],
        embeds: torch.Tensor,
        mask: torch.Tensor,
        owners: torch.Tensor,
        answers: torch.Tensor,
        answer_mask: torch.Tensor,
    ) -> torch.Tensor:
        """Logits of each answer's tokens, (pairs, longest answer, vocabulary).

        reading, answering: the passes with adapters, of prompts and of pairs.
        """
        # Positions count what is seen: of itself OPT does so, and Llama would count the gaps, too.
        seen = torch.cat([mask[owners], answer_mask[:, :-1]], dim=1)
        with reading:
            read = self._language_model(
                inputs_embeds=embeds,
                attention_mask=mask,
                position_ids=_positions(mask),
                use_cache=True,
                logits_to_keep=1,
            )
        read.cache.batch_select_indices(owners)
        with answering:
            followed = self._language_model(
                input_ids=answers[:, :-1],
                attention_mask=seen,
                position_ids=_positions(seen)[:, mask.shape[1] :],
                cache=read.cache,
            )
        return torch.cat([read.logits[owners], followed.logits], dim=1)

    def _score_t5(
        self,
        reading: AbstractContextManager[None],
        answering: AbstractContextManager[None],
        embeds: torch.Tensor,
        mask: torch.Tensor,
        owners: torch.Tensor,
        answers: torch.Tensor,
        answer_mask: torch.Tensor,
    ) -> torch.Tensor:
        """Logits of each answer's tokens, (pairs, longest answer, vocabulary)."""
        with reading:
            read = self._language_model.encoder(inputs_embeds=embeds, attention_mask=mask)
        with answering:
            logits: torch.Tensor = self._language_model(
                encoder_outputs=BaseModelOutput(last_hidden_state=read.last_hidden_state[owners]),
                attention_mask=mask[owners],
                decoder_attention_mask=answer_mask,
                labels=answers.masked_fill(answer_mask == 0, _IGNORED),
            ).logits
        return logits


def _positions(mask: torch.Tensor) -> torch.Tensor:
    """Where each token of rows is among those that are seen, (rows, tokens)."""
    return (mask.cumsum(dim=1) - 1).clamp(min=0)
