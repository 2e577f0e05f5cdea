"""Parameters of text generation."""

from pydantic import Field

from blipq.contract.base import Input


class Generation(Input):
    """Generation parameters under Hugging Face's names. Unset means LAVIS's default for the kind.

    Lengths count new tokens only. Captions default to 5 beams and 30 tokens, answers to 5 beams
    and 10 tokens. Sampling defaults to top_p 0.9 and top_k 50; top_k 0 is off.
    """

    max_new_tokens: int | None = Field(default=None, ge=1, le=512)
    min_new_tokens: int | None = Field(default=None, ge=0, le=512)
    num_beams: int | None = Field(default=None, ge=1, le=16)
    do_sample: bool | None = None
    temperature: float | None = Field(default=None, gt=0, le=10)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=0, le=1000)
    repetition_penalty: float | None = Field(default=None, gt=0, le=10)
    no_repeat_ngram_size: int | None = Field(default=None, ge=0, le=32)
    length_penalty: float | None = Field(default=None, ge=-10, le=10)
    num_return_sequences: int | None = Field(default=None, ge=1, le=16)
    seed: int | None = Field(default=None, ge=0, lt=2**63)
