"""The tokenizers of the three models, learned from the texts of the world."""

from collections.abc import Iterable, Iterator

from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from tools.demo_model.architecture import QUERIES, image_processor
from transformers import Blip2Processor, PreTrainedTokenizerFast

from blipq_worker.demo import world

IMAGE_TOKEN = "<image>"
CAPTION_PROMPTS = ("", "a photo of")
QUESTION_PROMPTS = ("Question: {} Short answer:", "Question: {} Answer:", "{}")
_CORPUS_SCENES = 3_000


def corpus() -> Iterator[str]:
    """Every kind of text that a model of this world reads or writes."""
    for seed in world.TRAINING_SEEDS[:_CORPUS_SCENES]:
        scene = world.scene(seed)
        yield from scene.matching_texts()
        yield f"a photo of {scene.caption}"
        for asked in scene.questions():
            for prompt in QUESTION_PROMPTS:
                next_turn = prompt.split()[0]
                yield f"{prompt.format(asked.question)} {asked.answer}. {next_turn}\n"


def opt_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE as OPT's, but blind to case: `</s>` begins, a line feed ends a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=440,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="</s> $A", pair="</s> $A $B", special_tokens=[("</s>", 2)]
    )
    return _wrapped(
        tokenizer, "left", bos_token="</s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


def itm_tokenizer() -> PreTrainedTokenizerFast:
    """WordPiece as BERT's uncased one, for the Q-Former: whole words, and characters."""
    normalizer = normalizers.BertNormalizer(lowercase=True)
    pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    words = set(_pieces(normalizer, pre_tokenizer, corpus()))
    characters = {*map(chr, range(33, 127))}
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]"]
    pieces = [*special, *sorted(words | characters), *(f"##{c}" for c in sorted(characters))]
    vocabulary = {piece: id for id, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.WordPiece()
    ends = [(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ends
    )
    return _wrapped(
        tokenizer,
        "right",
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        bos_token="[DEC]",
    )


def t5_tokenizer() -> PreTrainedTokenizerFast:
    """Unigram as T5's, of whole words with single characters to fall back on."""
    pre_tokenizer = pre_tokenizers.Metaspace()
    normalizer = normalizers.Sequence(
        [normalizers.Lowercase(), *(normalizers.Replace(mark, f" {mark}") for mark in "?.:")]
    )
    words = sorted(set(_pieces(normalizer, pre_tokenizer, corpus())))
    characters = sorted({*map(chr, range(33, 127)), "▁"} - set(words))
    scores = [(word, -5.0) for word in words] + [(c, -12.0) for c in characters]
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0)]
    tokenizer = Tokenizer(models.Unigram(special + scores, unk_id=2))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    return _wrapped(tokenizer, "right", eos_token="</s>", pad_token="<pad>", unk_token="<unk>")


def _pieces(
    normalizer: normalizers.Normalizer,
    pre_tokenizer: pre_tokenizers.PreTokenizer,
    texts: Iterable[str],
) -> Iterator[str]:
    for text in texts:
        for piece, _ in pre_tokenizer.pre_tokenize_str(normalizer.normalize_str(text.strip())):
            yield piece


def _wrapped(tokenizer: Tokenizer, side: str, **special: str) -> PreTrainedTokenizerFast:
    """With `<image>` as the last token, as in the published checkpoints."""
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, padding_side=side, clean_up_tokenization_spaces=False, **special
    )
    processor_of(wrapped)
    return wrapped


def processor_of(tokenizer: PreTrainedTokenizerFast) -> Blip2Processor:
    """The processor with this tokenizer, to which it adds `<image>` if that is missing."""
    return Blip2Processor(image_processor(), tokenizer, num_query_tokens=QUERIES)
