"""The sizes of the demo models and the models themselves, untrained."""

from functools import lru_cache

from transformers import (
    Blip2QFormerConfig,
    Blip2VisionConfig,
    Blip2VisionModel,
    OPTConfig,
    PreTrainedTokenizerBase,
    T5Config,
)
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

IMAGE_SIDE = 64
PATCHES_PER_SIDE = 8
QUERIES = 32
WIDTH = 128
QUERY_DEVIATION = 0.5  # as zeros, which is the default, all queries would stay the same


@lru_cache
def image_processor() -> BlipImageProcessorPil:
    """Resizes to the side of the vision model and normalizes as the published models do."""
    return BlipImageProcessorPil(
        size={"height": IMAGE_SIDE, "width": IMAGE_SIDE},
        image_mean=[0.48145466, 0.4578275, 0.40821073],
        image_std=[0.26862954, 0.26130258, 0.27577711],
    )


def vision_config() -> Blip2VisionConfig:
    """0.7 M parameters."""
    return Blip2VisionConfig(
        hidden_size=WIDTH,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=IMAGE_SIDE,
        patch_size=IMAGE_SIDE // PATCHES_PER_SIDE,
        initializer_range=0.02,
    )


def qformer_config(text: PreTrainedTokenizerBase | None = None) -> Blip2QFormerConfig:
    """0.7 M parameters, some more if it takes text as well."""
    return Blip2QFormerConfig(
        vocab_size=len(text) if text else 4,
        hidden_size=WIDTH,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        max_position_embeddings=64,
        encoder_hidden_size=WIDTH,
        use_qformer_text_input=text is not None,
    )


def opt_config(tokenizer: PreTrainedTokenizerBase) -> OPTConfig:
    """A decoder of 0.7 M parameters that ends its texts with a line feed, as BLIP-2's does."""
    return OPTConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        word_embed_proj_dim=WIDTH,
        ffn_dim=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=256,
        dropout=0.0,
        attention_dropout=0.0,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.convert_tokens_to_ids("Ċ"),
        pad_token_id=tokenizer.pad_token_id,
    )


def t5_config(tokenizer: PreTrainedTokenizerBase) -> T5Config:
    """An encoder and a decoder in the style of Flan-T5."""
    return T5Config(
        vocab_size=len(tokenizer),
        d_model=WIDTH,
        d_kv=32,
        d_ff=192,
        num_heads=4,
        num_layers=3,
        num_decoder_layers=2,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        bos_token_id=1,
        eos_token_id=1,
        pad_token_id=0,
        decoder_start_token_id=0,
    )


def vision_model() -> Blip2VisionModel:
    """The untrained vision model."""
    return Blip2VisionModel._from_config(vision_config(), attn_implementation="eager")
