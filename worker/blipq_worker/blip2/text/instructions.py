"""Prompts as an InstructBLIP's Q-Former reads them."""

from typing import Any

from blipq_worker.blip2.loading.checkpoints import Checkpoint, CheckpointError

#: Tokens of a prompt that are read, with [CLS] and [SEP], as in LAVIS: of a longer one the end.
_LONGEST = 128


class Instructions:
    """Tokenizes prompts for a Q-Former. Thread-safe."""

    def __init__(self, checkpoint: Checkpoint, tokenizer: Any) -> None:
        if len(tokenizer("")["input_ids"]) != 2:
            raise CheckpointError(
                f"the Q-Former's tokenizer of {checkpoint.name!r} does not put [CLS] and [SEP] "
                "around texts"
            )
        self._tokenizer = tokenizer
        positions = checkpoint.config.qformer_config.max_position_embeddings
        self._longest = min(_LONGEST, positions)

    def ids(self, prompt: str) -> tuple[int, ...]:
        """A prompt's token ids, from [CLS] to [SEP]; a long one's beginning is left out.

        In a chat that is the oldest turn; the language model reads all of it.
        """
        # The tokenizer would keep a truncation between calls, and calls come from several threads.
        ids: list[int] = self._tokenizer(prompt, verbose=False)["input_ids"]
        if len(ids) > self._longest:
            ids = [ids[0], *ids[1 - self._longest :]]
        return tuple(ids)
