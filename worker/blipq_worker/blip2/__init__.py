"""BLIP-2 itself: a resident generation checkpoint and, beside it, a retrieval checkpoint.

Read in this order: ``model`` (what a worker holds), ``loading`` and ``checkpoints`` (where it comes
from), ``features`` (image to queries), then what makes answers of them: ``generation`` with
``sessions`` and ``decoding``, ``choices``, ``retrieval`` and ``embedding``.

A name is imported when it is first used: a count of a model's memory takes a part of it alone, and
all of it takes seconds.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from blipq_worker.blip2.generation.items import GeneratedText, GenerateItem
    from blipq_worker.blip2.generation.sessions import WritingSession
    from blipq_worker.blip2.heads.embedding import Arrays, EmbedItem
    from blipq_worker.blip2.heads.heatmaps import ExplainItem
    from blipq_worker.blip2.heads.matching import MatchItem, RerankItem
    from blipq_worker.blip2.heads.scoring import RankItem
    from blipq_worker.blip2.loading.checkpoints import CheckpointError
    from blipq_worker.blip2.model import Adapted, Blip2, Item
    from blipq_worker.blip2.vision.cache import FeatureCache
    from blipq_worker.blip2.vision.preprocessing import Pixels

_MODULES = {
    **dict.fromkeys(("GenerateItem", "GeneratedText"), "generation.items"),
    "WritingSession": "generation.sessions",
    **dict.fromkeys(("Arrays", "EmbedItem"), "heads.embedding"),
    "ExplainItem": "heads.heatmaps",
    **dict.fromkeys(("MatchItem", "RerankItem"), "heads.matching"),
    "RankItem": "heads.scoring",
    "CheckpointError": "loading.checkpoints",
    **dict.fromkeys(("Adapted", "Blip2", "Item"), "model"),
    "FeatureCache": "vision.cache",
    "Pixels": "vision.preprocessing",
}

__all__ = [
    "Adapted",
    "Arrays",
    "Blip2",
    "CheckpointError",
    "EmbedItem",
    "ExplainItem",
    "FeatureCache",
    "GenerateItem",
    "GeneratedText",
    "Item",
    "MatchItem",
    "Pixels",
    "RankItem",
    "RerankItem",
    "WritingSession",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = found
    return found
