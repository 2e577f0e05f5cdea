"""From pixels to what both kinds of checkpoint go on from. Apart from the rest, to be cached."""

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
