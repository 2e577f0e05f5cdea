"""Texts as a retrieval checkpoint reads them."""

import re
from bisect import bisect_left
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
        """Where the ids of each word of a text are among its ids: nowhere, if it has none.

        A word has none if it is of control characters alone. Words that are cut off are left out.
        """
        read, end = match_text(text), len(self.ids(text)) - 1
        tokens = self._tokenizer(read, return_offsets_mapping=True, verbose=False)
        begins = [begin for begin, _ in tokens["offset_mapping"][1:-1]]
        found = []
        for word in re.finditer(r"\S+", read):
            first, behind = (1 + bisect_left(begins, place) for place in word.span())
            if end <= first < behind:
                break
            found.append(range(first, min(behind, end)))
        return found

    def write(self, path: Path) -> None:
        """Writes the tokenizer to a file of the library tokenizers. Raises OSError."""
        path.write_text(self._tokenizer.backend_tokenizer.to_str())

    def padded(
        self, texts: Sequence[str], device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and mask, (texts, longest), padded on the right: BERT's positions are absolute."""
        return padded([self.ids(text) for text in texts], self.pad, device)
