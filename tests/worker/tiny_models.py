"""Tiny checkpoints with random weights, saved with their processors; language models alone.

The weights are large enough that different pictures and prompts give different outputs.
"""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2ForImageTextRetrieval,
    Blip2Processor,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    InstructBlipProcessor,
    InstructBlipQFormerConfig,
    InstructBlipVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

SIDE = 28
QUERIES = 32
PLAIN_WIDTH = 32
WIDTH = 64  # a block of nf4: narrower layers cannot be quantized
_WORDS = (
    *("a", "photo", "of", "question", "answer", "short", "what", "is", "how", "many", "the"),
    *("color", "red", "green", "blue", "cat", "dog", "circle", "square", "above", "below"),
    *("left", "right", "yes", "no", "one", "two", "three", "in", "on", "where"),
)


def plain_opt(words: int, *, positions: int, spread: float) -> OPTForCausalLM:
    """A language model alone, in training mode; ``spread``: the deviation of its weights."""
    config = OPTConfig(
        vocab_size=words,
        hidden_size=PLAIN_WIDTH,
        word_embed_proj_dim=PLAIN_WIDTH,
        ffn_dim=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=positions,
        dropout=0.0,
        init_std=spread,
    )
    return OPTForCausalLM(config)


def plain_t5(words: int, *, spread: float) -> T5ForConditionalGeneration:
    """A language model alone with an output layer of its own, in training mode."""
    config = T5Config(
        vocab_size=words,
        d_model=PLAIN_WIDTH,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_decoder_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        decoder_start_token_id=0,
        initializer_factor=spread,
    )
    return T5ForConditionalGeneration(config)


def save_opt(folder: Path, **changes: Any) -> Path:
    """OPT: starts with </s> (2), pads with 1, ends with a line feed, as the published ones."""
    tokenizer = _opt_tokenizer()
    text = OPTConfig(
        vocab_size=len(tokenizer) + 8,
        hidden_size=WIDTH,
        word_embed_proj_dim=WIDTH,
        ffn_dim=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        dropout=0.0,
        bos_token_id=2,
        eos_token_id=tokenizer.convert_tokens_to_ids("Ċ"),
        pad_token_id=1,
        init_std=0.4,
    )
    return _save_generation(folder, text, tokenizer, **changes)


def save_t5(folder: Path, *, untied: bool = False, **changes: Any) -> Path:
    """T5 in the style of Flan: gated, ends with </s> (1), pads and starts with 0.

    untied: with an output layer of its own, as Flan's.
    """
    tokenizer = _t5_tokenizer()
    return _save_generation(folder, _t5_config(tokenizer, untied), tokenizer, **changes)


def _t5_config(tokenizer: Any, untied: bool = False) -> T5Config:
    return T5Config(
        vocab_size=len(tokenizer) + 8,
        d_model=WIDTH,
        d_kv=16,
        d_ff=128,
        num_heads=4,
        num_layers=2,
        num_decoder_layers=2,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        bos_token_id=1,
        decoder_start_token_id=0,
        initializer_factor=1.0,
        tie_word_embeddings=not untied,
    )


def plain_llama(words: int, *, positions: int, spread: float, sharing: int = 1) -> LlamaForCausalLM:
    """A language model alone, in training mode; ``sharing``: heads that share keys."""
    config = LlamaConfig(
        vocab_size=words,
        hidden_size=PLAIN_WIDTH,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4 // sharing,
        max_position_embeddings=positions,
        initializer_range=spread,
    )
    return LlamaForCausalLM(config)


def save_instructed_t5(folder: Path, **changes: Any) -> Path:
    """InstructBLIP with a T5."""
    tokenizer = _t5_tokenizer()
    return _save_instructed(folder, _t5_config(tokenizer), tokenizer, **changes)


def save_instructed_llama(folder: Path, *, sharing: int = 1, **changes: Any) -> Path:
    """InstructBLIP with a Llama, whose configuration says of tokens what the published ones say.

    These end, and pad, with other tokens than their tokenizers, which begin with </s> (2), too.
    """
    tokenizer = _llama_tokenizer()
    text = LlamaConfig(
        vocab_size=len(tokenizer) + 8,
        hidden_size=WIDTH,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4 // sharing,
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=-1,
        initializer_range=0.4,
    )
    return _save_instructed(folder, text, tokenizer, **changes)


def _save_instructed(
    folder: Path, text: Any, tokenizer: Any, *, side: int = SIDE, seed: int = 5
) -> Path:
    torch.manual_seed(seed)
    images = BlipImageProcessorPil(size={"height": side, "width": side})
    reader = _bert_tokenizer()
    processor = InstructBlipProcessor(images, tokenizer, reader, num_query_tokens=QUERIES)
    config = InstructBlipConfig(
        vision_config=InstructBlipVisionConfig(**_vision_fields(side)),
        qformer_config=InstructBlipQFormerConfig(
            vocab_size=len(reader),
            hidden_size=WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=128,
            max_position_embeddings=64,
            encoder_hidden_size=WIDTH,
            initializer_range=0.3,
        ),
        text_config=text,
        num_query_tokens=QUERIES,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    return _saved(InstructBlipForConditionalGeneration(config), processor, folder)


def save_itm(folder: Path, *, side: int = SIDE) -> Path:
    """A retrieval checkpoint whose vocabulary ends with [DEC], as the published ones."""
    torch.manual_seed(7)
    tokenizer = _bert_tokenizer()
    processor = _processor(tokenizer, side)
    image_token = tokenizer.convert_tokens_to_ids("<image>")
    config = Blip2Config(
        vision_config=Blip2VisionConfig(**_vision_fields(side)),
        # As in the published checkpoints, the image token lies just outside the embeddings.
        qformer_config=_qformer(vocab_size=image_token, use_qformer_text_input=True),
        text_config=OPTConfig(hidden_size=WIDTH, num_hidden_layers=1, vocab_size=8),
        num_query_tokens=QUERIES,
        image_text_hidden_size=16,
        image_token_index=image_token,
    )
    return _saved(Blip2ForImageTextRetrieval(config), processor, folder)


def _save_generation(
    folder: Path, text: Any, tokenizer: Any, *, side: int = SIDE, seed: int = 5
) -> Path:
    torch.manual_seed(seed)
    processor = _processor(tokenizer, side)
    config = Blip2Config(
        vision_config=Blip2VisionConfig(**_vision_fields(side)),
        qformer_config=_qformer(),
        text_config=text,
        num_query_tokens=QUERIES,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    return _saved(Blip2ForConditionalGeneration(config), processor, folder)


def _saved(model: Any, processor: Any, folder: Path) -> Path:
    _stir(model)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def _vision_fields(side: int) -> dict[str, Any]:
    return {
        "hidden_size": WIDTH,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": side,
        "patch_size": 14,
        "initializer_range": 0.3,
    }


def _qformer(**changes: Any) -> Blip2QFormerConfig:
    return Blip2QFormerConfig(
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=64,
        encoder_hidden_size=WIDTH,
        initializer_range=0.3,
        **changes,
    )


def _stir(model: Any) -> None:
    """Queries are zeros by default and would all stay equal; biases are zeros, too.

    T5's shared embeddings are so large by default that it repeats its first token for ever.
    """
    with torch.no_grad():
        model.query_tokens.normal_(std=0.5)
        if isinstance(getattr(model, "language_model", None), T5ForConditionalGeneration):
            for weight in model.language_model.parameters():
                weight.mul_(3.0)
            model.language_model.shared.weight.mul_(0.05)
            if not model.config.text_config.scale_decoder_outputs:
                own = model.language_model.shared.weight.roll(1, dims=0)
                model.language_model.lm_head.weight = torch.nn.Parameter(own)
        for name, weight in model.named_parameters():
            if name.endswith("bias"):
                weight.normal_(std=0.1)
    if hasattr(model, "language_projection"):
        torch.nn.init.normal_(model.language_projection.weight, std=0.5)


def _processor(tokenizer: Any, side: int) -> Blip2Processor:
    image_processor = BlipImageProcessorPil(size={"height": side, "width": side})
    return Blip2Processor(image_processor, tokenizer, num_query_tokens=QUERIES)


def _opt_tokenizer() -> PreTrainedTokenizerFast:
    alphabet = [*map(chr, range(33, 127)), "Ġ", "Ċ"]  # ASCII alone, so that any output decodes
    vocabulary = {token: i for i, token in enumerate(["<s>", "<pad>", "</s>", "<unk>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="</s> $A", special_tokens=[("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="</s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
    )


def _t5_tokenizer() -> PreTrainedTokenizerFast:
    pieces = [*("▁" + word for word in _WORDS), "▁", *"abcdefghijklmnopqrstuvwxyzQSAW:?,.!<>/"]
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    vocabulary += [(piece, -float(index + 1)) for index, piece in enumerate(pieces)]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


def _llama_tokenizer() -> PreTrainedTokenizerFast:
    pieces = [*("▁" + word for word in _WORDS), "▁", *"abcdefghijklmnopqrstuvwxyzQSAW:?,.!<>/"]
    # So unlikely that a text never comes to them.
    vocabulary = [("<unk>", 0.0), ("<s>", -1e4), ("</s>", -1e4)]
    vocabulary += [(piece, -float(index + 1)) for index, piece in enumerate(pieces)]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="</s> $A", special_tokens=[("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="</s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="[PAD]",
        additional_special_tokens=["<s>"],
    )


def _bert_tokenizer() -> PreTrainedTokenizerFast:
    letters = "abcdefghijklmnopqrstuvwxyz"
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *_WORDS]
    tokens += [letter for letter in letters if letter not in tokens]
    tokens += ["##" + letter for letter in letters] + list("?,<>[]")
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.WordPiece(vocab=vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        cls_token="[CLS]",
        sep_token="[SEP]",
        pad_token="[PAD]",
        unk_token="[UNK]",
        mask_token="[MASK]",
        bos_token="[DEC]",
    )
