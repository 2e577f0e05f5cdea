"""BLIP-2 itself: a resident generation checkpoint and, beside it, a retrieval checkpoint.

Read in this order: ``model`` (what a worker holds), ``loading`` and ``checkpoints`` (where it comes
from), ``features`` (image to queries), then what makes answers of them: ``generation`` with
``sessions`` and ``decoding``, ``choices``, ``retrieval`` and ``embedding``.
"""

from blipq_worker.blip2.generation.items import GeneratedText, GenerateItem
from blipq_worker.blip2.generation.sessions import WritingSession
from blipq_worker.blip2.heads.embedding import Arrays, EmbedItem
from blipq_worker.blip2.heads.matching import MatchItem, RerankItem
from blipq_worker.blip2.heads.scoring import RankItem
from blipq_worker.blip2.loading.checkpoints import CheckpointError
from blipq_worker.blip2.model import Blip2, Item
from blipq_worker.blip2.vision.cache import FeatureCache
from blipq_worker.blip2.vision.preprocessing import Pixels

__all__ = [
    "Arrays",
    "Blip2",
    "CheckpointError",
    "EmbedItem",
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
