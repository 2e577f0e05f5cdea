"""Captions and answers: one vision pass per image, then one language-model row per prompt.

Texts are written in flight (``sessions``).

The queries and the prompt enter the language model as embeddings, with no ids: that is what LAVIS
does (lavis/models/blip2_models/blip2_opt.py and blip2_t5.py), it cannot ignore the image, and
lengths and penalties count new tokens only. Paper: Li et al., BLIP-2, arXiv 2301.12597.
"""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from blipq_worker.blip2.decoding import DecodeLoop, Row, RowText
from blipq_worker.blip2.decoding.static import (
    COLUMNS,
    LONG_COLUMNS,
    StaticLoop,
    Way,
    free_memory,
    on_device,
    static_loop,
    ways,
)
from blipq_worker.blip2.generation.items import Asking, GeneratedText, GenerateItem
from blipq_worker.blip2.generation.routing import Loop, RoutedLoop
from blipq_worker.blip2.generation.sessions import WritingSession, most_joining
from blipq_worker.blip2.loading.checkpoints import Checkpoint, CheckpointError
from blipq_worker.blip2.text.instructions import Instructions
from blipq_worker.blip2.text.padding import padded
from blipq_worker.blip2.vision.features import Vision
from blipq_worker.blip2.vision.instructed import InstructedVision
from blipq_worker.blip2.vision.preprocessing import Pixels
from blipq_worker.catalog.params import INSTRUCTED_PENALTY, invalid
from blipq_worker.inference.requests import Family, FinishReason, GenerationParams

log = logging.getLogger(__name__)

# T5 counts distances and so has no last position; this bounds its memory as OPT's limit does.
_T5_POSITIONS = 2048

#: Slots of the loop beside the static ones, for long texts: its memory grows with them, and is
#: bounded by that of so many ordinary texts.
_LONG_SLOTS = 32

#: The most tokens around a prompt. Each of its own has at least a byte, but for a few characters
#: that a tokenizer takes apart.
_MARKS = 3
#: Tokens whose texts are remembered.
_TOKEN_TEXTS = 16_384


class Generator:
    """Runs a generation checkpoint. Not thread-safe, except for ``check``.

    slots: most texts in flight. static: on a GPU the first session opens static slots; else
    ``open_slots`` alone. instructions: of an InstructBLIP, whose ``vision`` is an InstructedVision.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        model: Any,
        tokenizer: Any,
        vision: Vision,
        *,
        slots: int = 32,
        static: bool = True,
        instructions: Instructions | None = None,
    ) -> None:
        if checkpoint.family == "retrieval":
            raise CheckpointError(f"{checkpoint.name!r} is a retrieval checkpoint: it cannot write")
        self.model = model
        self.vision = vision
        self.family = checkpoint.family
        self._tokenizer = tokenizer
        self._token_text = lru_cache(_TOKEN_TEXTS)(lambda token: str(tokenizer.decode([token])))
        self._instructions = instructions
        self._slots = slots
        self._static: StaticLoop | None = None
        self._opens_static = static and model.query_tokens.device.type == "cuda"
        self._num_query_tokens = checkpoint.num_query_tokens
        text = checkpoint.config.text_config
        # Of what is padded nothing is read; some configurations name a token that is not there.
        self._pad = text.pad_token_id if text.pad_token_id in range(text.vocab_size) else 0
        self._eos = _end_tokens(model.language_model, text, tokenizer, self.family)
        self._positions = _T5_POSITIONS if self.family == "t5" else text.max_position_embeddings
        #: Called after every decode step: a long batch is not a hung one.
        self.on_step: Callable[[], None] = lambda: None
        self._require_marks(checkpoint)

    def _require_marks(self, checkpoint: Checkpoint) -> None:
        # Without its first token OPT writes noise, and so does Llama, without its last one T5. They
        # are the tokenizer's business, and it has lost them before between versions.
        mark, at = self._mark(checkpoint.config.text_config)
        if self.ids("") != [mark] or self.ids("a photo of")[at] != mark:
            raise CheckpointError(
                f"the tokenizer of {checkpoint.name!r} does not put token {mark} "
                f"{'before' if at == 0 else 'after'} every text"
            )

    def _mark(self, text: Any) -> tuple[Any, int]:
        """The token that every prompt has, and where."""
        if self.family == "t5":
            return text.eos_token_id, -1
        # InstructBLIP's Llamas were trained behind </s>, which their configurations do not say.
        return (text.bos_token_id if self.family == "opt" else self._tokenizer.bos_token_id), 0

    def ids(self, prompt: str) -> list[int]:
        """A prompt's token ids, with the mark that the language model wants. Thread-safe."""
        ids: list[int] = self._tokenizer(prompt, verbose=False)["input_ids"]
        return ids

    def write_tokenizer(self, path: Path) -> None:
        """Writes what makes ids of texts to a file of the library tokenizers. Raises OSError."""
        path.write_text(self._tokenizer.backend_tokenizer.to_str())

    def answer_ids(self, text: str) -> list[int]:
        """The token ids with which the model would say ``text`` and end. Thread-safe."""
        if self.family == "t5":
            return self.ids(text)
        # After "answer:" they go on with a space, which is part of the next token; Llama's
        # tokenizer puts it there by itself.
        answer = f" {text.strip()}" if self.family == "opt" else text.strip()
        spoken = self._tokenizer(answer, add_special_tokens=False, verbose=False)
        return [*spoken["input_ids"], self._eos[0]]

    def room(self, new_tokens: int) -> int:
        """The most tokens a prompt may have, where ``new_tokens`` must follow it."""
        room = self._positions - self._num_query_tokens
        if self.family != "t5":
            room -= new_tokens
        return max(room, 0)

    def check(self, prompts: Sequence[str], params: GenerationParams) -> None:
        """Raises PermanentError ``invalid_request`` where ``generate`` would. Thread-safe."""
        for prompt in prompts:
            self.checked_ids(prompt, params)

    def checked_ids(self, prompt: str, params: GenerationParams) -> list[int]:
        """A prompt's token ids. Raises PermanentError ``invalid_request`` if they are too many."""
        ids = self.ids(prompt)
        room = self.room(params.max_new_tokens)
        if len(ids) > room:
            raise invalid(
                f"a prompt has {len(ids):,} tokens, where this model has room for {room:,}: "
                "shorten it, or lower max_new_tokens"
            )
        return ids

    def is_long(self, prompts: Sequence[str], params: GenerationParams) -> bool:
        """Whether one of these texts needs slots that grow, beside static ones. Thread-safe."""
        static = self._static
        if static is None:
            return False
        unseen = self.model.query_tokens[0]
        return not all(
            # Most are short by any count: it takes no tokenizer to see that.
            static.suits(Row(unseen, [0] * (len(prompt.encode()) + _MARKS), params))
            or static.suits(Row(unseen, self.ids(prompt), params))
            for prompt in prompts
        )

    def session(self) -> WritingSession:
        """Where items are written, each by its own parameters."""
        if self._opens_static:
            budget = free_memory(self.model.query_tokens.device)
            self.open_slots(ways(graphs=True), slots=self._slots, budget=budget)
        return WritingSession(self, self._loop())

    def long_session(self) -> WritingSession:
        """Where items are written that need slots that grow. Theirs are counted by themselves."""
        return WritingSession(self, self._growing(min(self._slots, _LONG_SLOTS)))

    @property
    def static_slots(self) -> int:
        """Slots that are open; 0 where texts in flight grow."""
        return 0 if self._static is None else self._static.slots

    @property
    def way(self) -> str:
        """How texts in flight are written, but for long ones."""
        return "growing slots" if self._static is None else f"static slots, {self._static.way}"

    def _loop(self) -> Loop:
        # A session that finds another one in the static slots, as the canary of a model in doubt
        # may, runs beside them: while it runs, nobody takes steps that would free them.
        static = None if self._static is None or self._static.running else self._static
        if static is None:
            return self._growing(self._slots)
        return RoutedLoop(static, self._growing(min(self._slots, _LONG_SLOTS)))

    def _growing(self, slots: int) -> DecodeLoop:
        return DecodeLoop(self.model.language_model, ends=self._eos, slots=slots)

    def open_slots(self, among: Sequence[Way], *, slots: int | None, budget: int) -> None:
        """Has texts written in static slots, if one of these ways works.

        Where ways capture graphs, looks at images are captured, too. slots, budget: see
        ``static_loop``. Slots of before must be empty; they are let go first. What does not work is
        left out; raises only what any use of the device raises by now.
        """
        self._static, self._opens_static = None, False
        try:
            self._static = static_loop(
                self.model.language_model,
                ends=self._eos,
                slots=slots,
                budget=budget,
                among=among,
                columns=COLUMNS if self._instructions is None else LONG_COLUMNS,
                repetition_penalty=1.0 if self._instructions is None else INSTRUCTED_PENALTY,
            )
            self._capture_looks(among)
        except Exception:
            log.warning("decoding: static slots or graphs are left out", exc_info=True)
        # What was given up may have broken the device's context: else a job would find that out.
        self.model.query_tokens.sum().item()

    def _capture_looks(self, among: Sequence[Way]) -> None:
        captures = [way.capture for way in among if way.capture is not None]
        if captures and self._static is not None:
            with on_device(self.model.query_tokens.device):
                self.vision.capture(captures[0](), most_joining(self.static_slots))

    @torch.inference_mode()
    def generate(
        self, items: Sequence[GenerateItem], wanted: Callable[[int], bool] = lambda index: True
    ) -> list[list[list[GeneratedText]]]:
        """For each item, for each of its prompts, ``num_return_sequences`` texts, best first.

        A seed determines an item's texts, whatever its neighbours; equal results need the same
        weights, precision and kind of device. Items that are not ``wanted`` any more are given up
        between two steps: their texts are void. Raises PermanentError ``invalid_request`` for a
        prompt that is too long.
        """
        if not items:
            return []
        session = self.session()
        try:
            return self._run(session, items, wanted)
        finally:
            session.close()  # static slots outlive it

    def _run(
        self,
        session: WritingSession,
        items: Sequence[GenerateItem],
        wanted: Callable[[int], bool],
    ) -> list[list[list[GeneratedText]]]:
        for index, item in enumerate(items):
            session.join((0, index), item)
        answers: list[list[list[GeneratedText]]] = [[] for _ in items]
        left = set(range(len(items)))
        while left := {index for index in left if wanted(index)}:
            for (_, index), texts in session.step([(0, index) for index in sorted(left)]):
                answers[index] = texts
                left.remove(index)
            self.on_step()
        return answers

    @torch.inference_mode()
    def seen(self, items: Sequence[Asking]) -> list[list[torch.Tensor]]:
        """For each item, for each of its prompts, the image as the language model reads it.

        (32, its hidden size) each. At most one pass of the vision tower over each image, whatever
        number of prompts follows.
        """
        if self._instructions is None:
            pixels = [item.pixels for item in items]
            images = self.project(pixels, [item.adapter for item in items])
            return [[image] * len(item.prompts) for image, item in zip(images, items, strict=True)]
        found = iter(self._instructed(items, self._instructions))
        return [[next(found) for _ in item.prompts] for item in items]

    def _instructed(
        self, items: Sequence[Asking], instructions: Instructions
    ) -> Sequence[torch.Tensor]:
        """What ``seen`` has, of all items one after the other."""
        assert isinstance(self.vision, InstructedVision)
        images = [item.pixels for item in items for _ in item.prompts]
        if not images:
            return []
        ids = [instructions.ids(prompt) for item in items for prompt in item.prompts]
        return self._projected(self.vision.instructed(images, ids)).unbind()

    @torch.inference_mode()
    def project(self, images: Sequence[Pixels], adapters: Sequence[int] = ()) -> torch.Tensor:
        """Images as BLIP-2's language model reads them, whatever the prompt: (B, 32, hidden).

        adapters: of each image; see ``adapters.layers.Rows``.
        """
        return self._projected(self.vision.queries(images, adapters))

    def _projected(self, queries: torch.Tensor) -> torch.Tensor:
        projection = self.model.language_projection
        embedding = self.model.language_model.get_input_embeddings().weight
        projected: torch.Tensor = projection(queries.to(projection.weight.dtype))
        return projected.to(embedding.dtype)

    def prefix(
        self, queries: torch.Tensor, rows: Sequence[list[int]]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What texts go on from: embeddings of queries and prompts, and their mask.

        The last prompt token of OPT and Llama must be the last of its row, as the next token
        follows there; the gap before the prompt costs nothing, since positions count the mask. T5
        measures distances, which a gap between queries and prompt would stretch, so its gap is at
        the end.
        """
        ids, mask = padded(rows, self._pad, queries.device, left=self.family != "t5")
        embedded = self.model.language_model.get_input_embeddings()(ids)
        seen = mask.new_ones(queries.shape[:2])
        return torch.cat([queries, embedded], dim=1), torch.cat([seen, mask], dim=1)

    def text(self, row: Sequence[int]) -> GeneratedText:
        """What new tokens say, up to the first end token."""
        end = next((at for at, token in enumerate(row) if token in self._eos), None)
        kept = row if end is None else row[:end]
        text: str = self._tokenizer.decode(kept, skip_special_tokens=True)
        if self.family != "t5":
            text = text.strip()
        return GeneratedText(text, len(row) if end is None else end + 1)

    def answer(self, written: RowText, params: GenerationParams) -> GeneratedText:
        """What was written, and how sure of it the model was."""
        text = self.text(written.tokens)
        ids, logs = written.tokens[: text.tokens], written.logs[: text.tokens]
        likelihood = math.fsum(logs)
        finite = bool(logs) and math.isfinite(likelihood)
        ended: FinishReason = "stop" if ids and ids[-1] in self._eos else "length"
        return replace(
            text,
            log_likelihood=likelihood if finite else None,
            mean_token_probability=math.fsum(map(math.exp, logs)) / len(logs) if finite else None,
            finish_reason="loop" if written.looped else ended,
            rewritten=written.rewritten,
            logprobs=self._logprobs(ids, logs) if params.logprobs and finite else None,
        )

    def _logprobs(
        self, ids: Sequence[int], logs: Sequence[float]
    ) -> tuple[tuple[int, str, float], ...]:
        texts = map(self._token_text, ids)
        return tuple(zip(ids, texts, logs, strict=True))


def _end_tokens(language_model: Any, text_config: Any, tokenizer: Any, family: Family) -> list[int]:
    configured = language_model.generation_config.eos_token_id
    if configured is None:
        configured = text_config.eos_token_id
    if configured is None:  # the end that LAVIS trains OPT to write
        configured = tokenizer("\n", add_special_tokens=False)["input_ids"][-1]
    ends = [configured] if isinstance(configured, int) else list(configured)
    if family == "llama":  # InstructBLIP's were trained to end as the tokenizer has it
        ends = [tokenizer.eos_token_id, *(end for end in ends if end != tokenizer.eos_token_id)]
    return ends
