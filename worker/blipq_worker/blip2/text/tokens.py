"""Texts as a retrieval checkpoint reads them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from blipq_worker.blip2.loading.checkpoints import Checkpoint, CheckpointError
from blipq_worker.blip2.text.padding import padded
from blipq_worker.catalog.prompts import match_text


class Texts:
    """Tokenizes texts for a retrieval checkpoint. Thread-safe.

    longest: tokens after which a text is cut, its end token kept; None cuts nothing.
    """

    def __init__(self, checkpoint: Checkpoint, tokenizer: Any, *, longest: int | None) -> None:
        if len(tokenizer("")["input_ids"]) != 2:
            raise CheckpointError(
                f"the tokenizer of {checkpoint.name!r} does not put [CLS] and [SEP] around texts"
            )
        self._tokenizer = tokenizer
        self._longest = longest
        self.pad: int = tokenizer.pad_token_id

    def ids(self, text: str) -> list[int]:
        """A text's token ids, from [CLS] to [SEP]."""
        # Padding and truncation are not the tokenizer's here: it would keep them between calls,
        # and calls come from several threads.
        ids: list[int] = self._tokenizer(match_text(text), verbose=False)["input_ids"]
        if self._longest is not None and len(ids) > self._longest:
            return [*ids[: self._longest - 1], ids[-1]]
        return ids

    def words(self, text: str) -> list[range]:
        """Where the ids of each word of a text are among its ids; what is cut off is left out."""
        found, start, end = [], 1, len(self.ids(text)) - 1
        for word in match_text(text).split():
            ids = self._tokenizer(word, add_special_tokens=False, verbose=False)["input_ids"]
            found.append(range(start, min(start + len(ids), end)))
            start += len(ids)
        return [word for word in found if word]

    def write(self, path: Path) -> None:
        """Writes the tokenizer to a file of the library tokenizers. Raises OSError."""
        path.write_text(self._tokenizer.backend_tokenizer.to_str())

    def padded(
        self, texts: Sequence[str], device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and mask, (texts, longest), padded on the right: BERT's positions are absolute."""
        return padded([self.ids(text) for text in texts], self.pad, device)
