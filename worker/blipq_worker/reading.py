"""Whether a model has room for an item's texts, counted without the model: by its tokenizers."""

import threading
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer

from blipq.contract import ErrorCode
from blipq_worker.catalog.prompts import match_text
from blipq_worker.inference.interface import ItemFailed
from blipq_worker.inference.requests import (
    Embed,
    Explain,
    Failure,
    Generate,
    Item,
    Match,
    ModelInfo,
    Rank,
    Reading,
    Rerank,
)


class Readers:
    """Counts tokens as the served models do. Thread-safe.

    Each tokenizer is read from its file once. Raises ItemFailed where an item could not run,
    whatever its image, with the words of ``Blip2.check``.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()  # held while a file is read, so that each is read once
        self._tokenizers: dict[str, Tokenizer] = {}

    def check(self, model: ModelInfo, item: Item) -> None:
        """Raises ItemFailed: a text is too long, or the model has no checkpoint for the item."""
        match item:
            case Generate():
                self._check_generate(model, item)
            case Rank():
                self._check_rank(model, item)
            case Match() | Explain() | Rerank():
                _retrieval(model)
            case Embed():
                self._check_embed(model, item)

    def _check_generate(self, model: ModelInfo, item: Generate) -> None:
        room = model.room(item.params.max_new_tokens)
        for prompt in item.prompts:
            count = self._count(model.reading, prompt)
            if count > room:
                raise _invalid(
                    f"a prompt has {count:,} tokens, where this model has room for {room:,}: "
                    "shorten it, or lower max_new_tokens"
                )

    def _check_rank(self, model: ModelInfo, item: Rank) -> None:
        room = model.room(self._longest_answer(model, item.choices))
        count = max(self._count(model.reading, prompt) for prompt in item.prompts)
        if count > room:
            raise _invalid(
                f"a prompt has {count:,} tokens, where its choices leave room for {room:,}"
            )

    def _longest_answer(self, model: ModelInfo, choices: Iterable[str]) -> int:
        if model.family == "t5":
            return max(self._count(model.reading, choice) for choice in choices)
        # As the model generates it: behind a space, which Llama's tokenizer adds by itself, and
        # with the end token.
        space = " " if model.family == "opt" else ""
        spoken = (f"{space}{choice.strip()}" for choice in choices)
        return 1 + max(self._count(model.reading, text, marks=False) for text in spoken)

    def _check_embed(self, model: ModelInfo, item: Embed) -> None:
        reading = _retrieval(model)
        count = self._count(reading, match_text(item.text or ""))
        if count > reading.positions:
            raise _invalid(
                f"a text has {count:,} tokens, where this model reads {reading.positions:,}"
            )

    def _count(self, reading: Reading, text: str, *, marks: bool = True) -> int:
        """Tokens of a text. marks: with those that the tokenizer puts around every text."""
        return len(self._tokenizer(reading).encode(text, add_special_tokens=marks))

    def _tokenizer(self, reading: Reading) -> Tokenizer:
        with self._lock:
            found = self._tokenizers.get(reading.tokenizer)
            if found is None:
                found = self._tokenizers[reading.tokenizer] = _loaded(Path(reading.tokenizer))
            return found


def _loaded(path: Path) -> Tokenizer:
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json" if path.is_dir() else path))
    # The engine's has neither: whole texts are counted, and special tokens in them are plain text.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return tokenizer


def _retrieval(model: ModelInfo) -> Reading:
    reading = model.retrieval_reading
    if reading is None:
        message = f"the served model {model.checkpoint!r} has no retrieval checkpoint"
        raise ItemFailed(Failure("permanent", ErrorCode.MODEL_UNAVAILABLE, message))
    return reading


def _invalid(message: str) -> ItemFailed:
    return ItemFailed(Failure("permanent", ErrorCode.INVALID_REQUEST, message))
