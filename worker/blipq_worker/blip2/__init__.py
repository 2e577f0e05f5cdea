"""BLIP-2 itself: a resident generation checkpoint and, beside it, a retrieval checkpoint.

Read in this order: ``model`` (what a worker holds), ``loading`` and ``checkpoints`` (where it comes
from), ``features`` (image to queries), then what makes answers of them: ``generation`` with
``sessions`` and ``decoding``, ``choices``, ``retrieval`` and ``embedding``.
"""

from blipq_worker.blip2.cache import FeatureCache
from blipq_worker.blip2.checkpoints import CheckpointError
from blipq_worker.blip2.choices import RankItem
from blipq_worker.blip2.embedding import Arrays, EmbedItem
from blipq_worker.blip2.generation import GeneratedText, GenerateItem, GenerationParams, resolve
from blipq_worker.blip2.model import Blip2, Feature, Item, ModelInfo
from blipq_worker.blip2.preprocessing import Pixels
from blipq_worker.blip2.prompts import caption_prompt, match_text, vqa_prompt
from blipq_worker.blip2.retrieval import MatchItem, RerankItem
from blipq_worker.blip2.sessions import WritingSession

__all__ = [
    "Arrays",
    "Blip2",
    "CheckpointError",
    "EmbedItem",
    "Feature",
    "FeatureCache",
    "GenerateItem",
    "GeneratedText",
    "GenerationParams",
    "Item",
    "MatchItem",
    "ModelInfo",
    "Pixels",
    "RankItem",
    "RerankItem",
    "WritingSession",
    "caption_prompt",
    "match_text",
    "resolve",
    "vqa_prompt",
]
