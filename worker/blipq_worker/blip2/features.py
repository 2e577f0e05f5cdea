"""From pixels and texts to what both kinds of checkpoint go on from.

Apart from the rest, to be cached. Hidden sizes are those of the published checkpoints.
"""

from collections.abc import Sequence
from typing import Any

import torch


def image_features(model: Any, pixels: Sequence[torch.Tensor]) -> torch.Tensor:
    """The vision tower's output, (B, patches + 1, hidden), for B tensors of shape (3, S, S)."""
    batch = torch.stack(tuple(pixels)).to(model.query_tokens.device)
    features: torch.Tensor = model.vision_model(batch).last_hidden_state
    return features


def query_features(model: Any, images: torch.Tensor) -> torch.Tensor:
    """The Q-Former's 32 queries after they have read each image: (B, 32, 768), fp32."""
    queries: torch.Tensor = model.qformer(
        query_embeds=model.query_tokens.expand(len(images), -1, -1),
        encoder_hidden_states=images,
    ).last_hidden_state
    return queries


def text_features(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """What the Q-Former makes of each token of B texts: (B, tokens, 768), fp32."""
    features: torch.Tensor = model.qformer(
        query_embeds=model.embeddings(input_ids=ids), query_length=0, attention_mask=mask
    ).last_hidden_state
    return features


def pair_features(
    model: Any, images: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """The 32 queries after they have read each image and its text together: (B, 32, 768), fp32."""
    queries = model.query_tokens.expand(len(ids), -1, -1)
    count = queries.shape[1]
    read: torch.Tensor = model.qformer(
        query_embeds=model.embeddings(input_ids=ids, query_embeds=queries),
        query_length=count,
        attention_mask=torch.cat([mask.new_ones(queries.shape[:2]), mask], dim=1),
        encoder_hidden_states=images,
    ).last_hidden_state
    return read[:, :count]
