"""Between jobs and the process that runs their model. Imports no torch, Celery or Redis.

One *engine* process owns a device: its models, their batcher and what they know of images. Any
number of *fronts* take jobs, fetch and decode images, and submit items: ``EngineClient`` in a
front, ``EngineServer`` in the engine, a Unix socket between them. ``LocalInference`` is the same
interface without a socket. Read ``requests`` and ``interface`` first, then ``protocol``.

The engine trusts no front: fronts touch what strangers send. A front gets credits, and the engine
never holds more of its items; each item is answered exactly once, cancelled ones, too, and gives
its credit back with the answer. Images go by the digests of their pixels, which the engine takes.
"""

from blipq_worker.inference.address import AddressError
from blipq_worker.inference.client import EngineClient
from blipq_worker.inference.interface import (
    Backend,
    EngineBusy,
    EngineGone,
    Handle,
    HeapRows,
    Inference,
    InferenceError,
    ItemFailed,
    Rows,
    UnknownModel,
)
from blipq_worker.inference.local import LocalInference
from blipq_worker.inference.protocol import ProtocolError
from blipq_worker.inference.requests import (
    Answer,
    Array,
    Embed,
    Embedded,
    Explain,
    Failure,
    Feature,
    Generate,
    Generated,
    GeneratedText,
    GenerationParams,
    ImagePixels,
    Item,
    Load,
    Match,
    Matched,
    ModelInfo,
    Outcome,
    Priority,
    Rank,
    Ranked,
    Reading,
    Recipe,
    Rerank,
    Reranked,
    Value,
)
from blipq_worker.inference.server import EngineServer

__all__ = [
    "AddressError",
    "Answer",
    "Array",
    "Backend",
    "Embed",
    "Embedded",
    "EngineBusy",
    "EngineClient",
    "EngineGone",
    "EngineServer",
    "Explain",
    "Failure",
    "Feature",
    "Generate",
    "Generated",
    "GeneratedText",
    "GenerationParams",
    "Handle",
    "HeapRows",
    "ImagePixels",
    "Inference",
    "InferenceError",
    "Item",
    "ItemFailed",
    "Load",
    "LocalInference",
    "Match",
    "Matched",
    "ModelInfo",
    "Outcome",
    "Priority",
    "ProtocolError",
    "Rank",
    "Ranked",
    "Reading",
    "Recipe",
    "Rerank",
    "Reranked",
    "Rows",
    "UnknownModel",
    "Value",
]
