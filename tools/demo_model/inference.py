"""How the service asks the models, in a few lines, to measure them in the same way."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import (
    Blip2ForConditionalGeneration,
    Blip2ForImageTextRetrieval,
    PreTrainedTokenizerBase,
)


@dataclass(frozen=True)
class Decoding:
    """How an answer is searched for."""

    num_beams: int
    max_new_tokens: int
    length_penalty: float = 1.0


CAPTION = Decoding(num_beams=5, max_new_tokens=30, length_penalty=1.0)
OPT_ANSWER = Decoding(num_beams=5, max_new_tokens=10, length_penalty=0.0)
T5_ANSWER = Decoding(num_beams=5, max_new_tokens=10, length_penalty=-1.0)
GREEDY = Decoding(num_beams=1, max_new_tokens=30)


def _queried(model: torch.nn.Module, images: Tensor) -> Tensor:
    """Vision features (batch, 65, width) to the outputs of the queries (batch, 32, width)."""
    queries = model.query_tokens.expand(len(images), -1, -1)
    return model.qformer(query_embeds=queries, encoder_hidden_states=images).last_hidden_state


@torch.no_grad()
def generate(
    model: Blip2ForConditionalGeneration,
    tokenizer: PreTrainedTokenizerBase,
    images: Tensor,
    prompts: Sequence[str],
    decoding: Decoding,
) -> list[str]:
    """One text for every image (batch, 65, width; vision features) and its prompt."""
    text = tokenizer(list(prompts), padding=True, return_tensors="pt")
    prefix = model.language_projection(_queried(model, images.to(model.dtype)))
    embedded = model.language_model.get_input_embeddings()(text.input_ids)
    seen = torch.ones(prefix.shape[:2], dtype=text.attention_mask.dtype)
    tokens = model.language_model.generate(
        inputs_embeds=torch.cat([prefix.to(embedded.dtype), embedded], dim=1),
        attention_mask=torch.cat([seen, text.attention_mask], dim=1),
        num_beams=decoding.num_beams,
        max_new_tokens=decoding.max_new_tokens,
        min_new_tokens=0 if model.config.is_encoder_decoder else 1,
        length_penalty=decoding.length_penalty,
        do_sample=False,
    )
    return [text.strip() for text in tokenizer.batch_decode(tokens, skip_special_tokens=True)]


@torch.no_grad()
def match_logits(
    model: Blip2ForImageTextRetrieval,
    tokenizer: PreTrainedTokenizerBase,
    images: Tensor,
    texts: Sequence[str],
) -> Tensor:
    """Logits (batch, 2) of "no" and "yes, the text matches the image", pair by pair."""
    text = tokenizer(list(texts), padding=True, return_tensors="pt")
    queries = model.query_tokens.expand(len(images), -1, -1)
    seen = torch.ones(queries.shape[:2], dtype=text.attention_mask.dtype)
    hidden = model.qformer(
        query_embeds=model.embeddings(input_ids=text.input_ids, query_embeds=queries),
        query_length=queries.shape[1],
        attention_mask=torch.cat([seen, text.attention_mask], dim=1),
        encoder_hidden_states=images.to(model.dtype),
    ).last_hidden_state
    return model.itm_head(hidden[:, : queries.shape[1]].to(model.itm_head.weight.dtype)).mean(1)


@torch.no_grad()
def image_embeddings(model: Blip2ForImageTextRetrieval, images: Tensor) -> Tensor:
    """Unit vectors (batch, 32, size) of the images."""
    projected = model.vision_projection(_queried(model, images.to(model.dtype)))
    return torch.nn.functional.normalize(projected, dim=-1)


@torch.no_grad()
def text_embeddings(
    model: Blip2ForImageTextRetrieval, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]
) -> Tensor:
    """Unit vectors (batch, size) of the texts."""
    text = tokenizer(list(texts), padding=True, return_tensors="pt")
    hidden = model.qformer(
        query_embeds=model.embeddings(input_ids=text.input_ids),
        query_length=0,
        attention_mask=text.attention_mask,
    ).last_hidden_state
    return torch.nn.functional.normalize(model.text_projection(hidden[:, 0]), dim=-1)


def similarities(images: Tensor, texts: Tensor) -> Tensor:
    """Cosines (images, texts) of (images, 32, size) and (texts, size), the best query of each."""
    return torch.einsum("iqd,td->iqt", images, texts).amax(dim=1)
