"""A mid-size BLIP-2 with random weights: large enough that the model, not the queue, dominates.

ViT 384 x 12 at 224 px with patches of 14, Q-Former 384 x 6 with 32 queries, OPT 512 x 8. The
retrieval checkpoint has the same vision tower, as the published ones do.
"""

from pathlib import Path

import torch
from transformers import (
    AutoProcessor,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2ForImageTextRetrieval,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    OPTConfig,
)

from blipq_worker.catalog.models import demo_folder

FOLDER = Path(__file__).parent / "models"
SIDE, QUERIES, WIDTH, TEXT_WIDTH = 224, 32, 384, 512
VERSION = "1"
_TEXT = {"hidden_size": TEXT_WIDTH, "ffn_dim": 4 * TEXT_WIDTH, "num_hidden_layers": 8}
_TEXT |= {"num_attention_heads": 8, "vocab_size": 2_049}


def mid_size() -> str:
    """The model as BLIPQ_MODELS names it; written once."""
    written, matched, mark = FOLDER / "opt", FOLDER / "itm", FOLDER / VERSION
    if not mark.exists():
        torch.manual_seed(11)
        tower = _write_generation(written, _vision(), _qformer(vocab_size=4), _TEXT)
        _write_retrieval(matched, tower)
        mark.touch()
    return f"{written}+{matched}"


def full_size() -> str:
    """The sizes of blip2-opt-2.7b, random weights in 16 bits: a folder of 7.5 GB, written once."""
    written, mark = FOLDER / "opt-2.7b", FOLDER / f"opt-2.7b-{VERSION}"
    if not mark.exists():
        torch.manual_seed(11)
        torch.set_default_dtype(torch.float16)
        try:
            text = {"hidden_size": 2_560, "ffn_dim": 10_240, "num_hidden_layers": 32}
            text |= {"num_attention_heads": 32, "vocab_size": 50_304}
            _write_generation(written, Blip2VisionConfig(), Blip2QFormerConfig(), text)
            mark.touch()
        finally:
            torch.set_default_dtype(torch.float32)
    return str(written)


def large() -> str:
    """A model whose weights, in fp32 as the published ones, are 2 GB: a folder, written once."""
    written, mark = FOLDER / "large", FOLDER / f"large-{VERSION}"
    if not mark.exists():
        torch.manual_seed(11)
        text = {"hidden_size": 1_536, "ffn_dim": 6_144, "num_hidden_layers": 16}
        text |= {"num_attention_heads": 16, "vocab_size": 2_049}
        _write_generation(written, _vision(), _qformer(vocab_size=4), text)
        mark.touch()
    return str(written)


def _vision() -> Blip2VisionConfig:
    return Blip2VisionConfig(
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=12,
        num_attention_heads=6,
        image_size=SIDE,
        patch_size=14,
        initializer_range=0.02,
    )


def _qformer(**changes: object) -> Blip2QFormerConfig:
    return Blip2QFormerConfig(
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=6,
        num_attention_heads=6,
        encoder_hidden_size=WIDTH,
        **changes,
    )


def _write_generation(
    folder: Path, vision: Blip2VisionConfig, qformer: Blip2QFormerConfig, text: dict[str, int]
) -> dict[str, torch.Tensor]:
    """Writes a generation checkpoint with an OPT; its vision tower's weights."""
    processor = _processor("opt")
    tokenizer = processor.tokenizer
    opt = OPTConfig(
        **text,
        word_embed_proj_dim=text["hidden_size"],
        max_position_embeddings=512,
        dropout=0.0,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.convert_tokens_to_ids("Ċ"),
        pad_token_id=tokenizer.pad_token_id,
    )
    config = Blip2Config(
        vision_config=vision,
        qformer_config=qformer,
        text_config=opt,
        num_query_tokens=QUERIES,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    model = Blip2ForConditionalGeneration(config)
    torch.nn.init.normal_(model.query_tokens, std=0.5)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return dict(model.vision_model.state_dict())


def _write_retrieval(folder: Path, tower: dict[str, torch.Tensor]) -> None:
    processor = _processor("itm")
    tokenizer = processor.tokenizer
    config = Blip2Config(
        vision_config=_vision(),
        qformer_config=_qformer(vocab_size=len(tokenizer), use_qformer_text_input=True),
        text_config=OPTConfig(hidden_size=64, num_hidden_layers=1, vocab_size=8),
        num_query_tokens=QUERIES,
        image_text_hidden_size=256,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    model = Blip2ForImageTextRetrieval(config)
    torch.nn.init.normal_(model.query_tokens, std=0.5)
    model.vision_model.load_state_dict(tower)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def _processor(name: str) -> "AutoProcessor":
    """The demo model's, at this size."""
    processor = AutoProcessor.from_pretrained(demo_folder() / name)
    processor.image_processor.size = {"height": SIDE, "width": SIDE}
    return processor
