"""Parameters of text generation."""

from typing import Annotated, Literal

from pydantic import Field

from blipq.contract.base import Input

OnLoop = Literal["end", "rewrite", "keep"]

#: What a text's ``mean_token_probability`` must reach, or else it is marked as uncertain.
Confidence = Annotated[float, Field(ge=0, le=1)]


class Generation(Input):
    """Generation parameters under Hugging Face's names. Unset means LAVIS's default for the kind.

    Lengths count new tokens only. Captions default to 5 beams and 30 tokens, answers to 5 beams
    and 10 tokens. Sampling defaults to top_p 0.9 and top_k 50; top_k 0 is off.

    ``on_loop``: what becomes of a text that repeats itself over and over: it ends there (the
    default), is written once more without repeating any three tokens (``rewrite``), or goes on
    (``keep``). ``logprobs``: the result has each token's probability, for at most 16 questions.
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
    on_loop: OnLoop | None = None
    logprobs: bool | None = None
