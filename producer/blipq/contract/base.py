"""What all parts of the contract share."""

from enum import StrEnum
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

#: Goes up when a worker must know something new to run a job (see ``contract_of``). A worker that
#: meets a newer number leaves the job in its queue, so workers are deployed before producers.
#: 2: buckets with capitals or underscores, metadata of indexes of up to 1,024 characters.
#: 3: images that are a part of an object (``offset``, ``length``), maps of matches (``explain``).
#: 4: ``min_confidence``, and ``on_loop`` and ``logprobs`` of texts.
CONTRACT = 4


class Input(BaseModel):
    """Base of what callers send: an unknown field is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Output(BaseModel):
    """Base of what workers send: unknown fields are ignored, so that they can be added."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class Kind(StrEnum):
    """What a job computes; also the verb in the CLI and on the client."""

    CAPTION = "caption"
    VQA = "vqa"
    MATCH = "match"
    EMBED = "embed"
    DESCRIBE = "describe"
    SEARCH = "search"


#: What is wrong with a text that UTF-8 cannot hold.
HALF_A_PAIR = "half of a surrogate pair (\\ud83d alone) is no text"

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
#: Names of served models and indexes end up in queue names, keys and folders.
Name = Annotated[str, Field(pattern=NAME_PATTERN)]

MetadataName = Annotated[str, Field(max_length=64)]
#: As long as a key of S3, which rules of ``blipq watch`` may put there.
MetadataValue = Annotated[str, Field(max_length=1024)]

#: At most 16 pairs.
Metadata = Annotated[dict[MetadataName, MetadataValue], Field(max_length=16)]
