"""How many weights a checkpoint has, by its configuration alone.

Transformers would count them too, on torch's meta device, but only importing its models takes
seconds. The tests hold these counts against such models, layer by layer.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

#: Rows and columns of a linear layer's weights.
Matrix = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Size:
    """Weights of a part of a checkpoint.

    linear: those of layers that a quantizer may take; ``rows`` are the outputs of these layers, in
    all. rest: biases, norms, embeddings, and layers that no quantizer takes.
    """

    part: str
    rest: int
    linear: int = 0
    rows: int = 0

    @classmethod
    def of(cls, part: str, rest: int, matrices: Iterable[Matrix]) -> "Size":
        """A part with these linear layers."""
        found = list(matrices)
        return cls(part, rest, sum(r * c for r, c in found), sum(r for r, _ in found))


def sizes_of(config: Any, *, retrieval: bool = False) -> Iterator[Size]:
    """The parts of a generation checkpoint, or of one for retrieval."""
    hidden = config.qformer_config.hidden_size
    instructed = config.model_type == "instructblip"
    yield Size("q-former", _qformer(config, text=retrieval or instructed))
    yield _vision(config.vision_config)
    if retrieval:
        # Two outputs say whether text and image match; two projections compare them.
        yield Size("heads", 2 * (hidden + 1) + 2 * config.image_text_hidden_size * (hidden + 1))
        return
    text = config.text_config
    yield Size("projection", text.hidden_size * (hidden + 1))
    yield {"t5": _t5, "llama": _llama}.get(text.model_type, _opt)(text)


def _side(size: int | list[int] | tuple[int, ...]) -> int:
    return size if isinstance(size, int) else size[0]


def _vision(config: Any) -> Size:
    wide, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    patch = _side(config.patch_size)
    positions = (_side(config.image_size) // patch) ** 2 + 1
    embeddings = wide + positions * wide + wide * (3 * patch**2 + 1)
    biases = (3 * wide if config.qkv_bias else 0) + 2 * wide + inner
    norms = 4 * wide
    rest = embeddings + layers * (biases + norms) + 2 * wide
    matrices = [(3 * wide, wide), (wide, wide), (inner, wide), (wide, inner)]
    return Size.of("vision tower", rest, matrices * layers)


def _qformer(config: Any, *, text: bool) -> int:
    """The Q-Former and its query tokens; for ``text`` it has embeddings, too."""
    qformer = config.qformer_config
    wide, inner, seen = qformer.hidden_size, qformer.intermediate_size, qformer.encoder_hidden_size
    layers = qformer.num_hidden_layers
    crossing = len(range(0, layers, qformer.cross_attention_frequency))
    attention = 2 * wide * (wide + 1) + 2 * wide  # query, output, and its norm
    forward = inner * (wide + 1) + wide * (inner + 1) + 2 * wide
    # One for queries, one for texts; InstructBLIP, which always reads texts, has no such option.
    forwards = 2 if getattr(qformer, "use_qformer_text_input", True) else 1
    count: int = config.num_query_tokens * wide + 2 * wide
    count += layers * (attention + 2 * wide * (wide + 1) + forwards * forward)
    count += crossing * (attention + 2 * wide * (seen + 1))
    if text:
        count += (qformer.vocab_size + qformer.max_position_embeddings) * wide
    return count


def _opt(config: Any) -> Size:
    wide, inner, layers = config.hidden_size, config.ffn_dim, config.num_hidden_layers
    narrow = config.word_embed_proj_dim
    bias, norm = int(config.enable_bias), 2 * wide * config.layer_norm_elementwise_affine
    embeddings = config.vocab_size * narrow * (1 if config.tie_word_embeddings else 2)
    positions = (config.max_position_embeddings + 2) * wide  # OPT's begin at 2
    rest = embeddings + positions + layers * (bias * (5 * wide + inner) + 2 * norm)
    if config.do_layer_norm_before and not config._remove_final_layer_norm:
        rest += norm
    matrices = [(wide, wide)] * 4 + [(inner, wide), (wide, inner)]
    resized = [] if narrow == wide else [(narrow, wide), (wide, narrow)]
    return Size.of("language model", rest, [*matrices * layers, *resized])


def _t5(config: Any) -> Size:
    wide, inner, heads = config.d_model, config.d_ff, config.num_heads * config.d_kv
    gates = 2 if config.is_gated_act else 1
    encoder, decoder = config.num_layers, config.num_decoder_layers
    # Transformers calls every T5 tied, and remembers by this that Flan's output layer is its own.
    outputs = 1 if config.scale_decoder_outputs else 2
    rest = config.vocab_size * wide * outputs
    rest += 2 * config.relative_attention_num_buckets * config.num_heads
    rest += wide * (2 * encoder + 3 * decoder + 2)  # norms
    rest += (encoder + decoder) * inner * wide  # `wo`, which no quantizer takes
    attention = [(heads, wide)] * 3 + [(wide, heads)]
    gate = [(inner, wide)] * gates
    matrices = (attention + gate) * encoder + (attention * 2 + gate) * decoder
    return Size.of("language model", rest, matrices)


def _llama(config: Any) -> Size:
    wide, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    heads = config.num_attention_heads * config.head_dim
    shared = config.num_key_value_heads * config.head_dim
    embeddings = config.vocab_size * wide * (1 if config.tie_word_embeddings else 2)
    biases = (heads + 2 * shared + wide if config.attention_bias else 0) + (
        2 * inner + wide if config.mlp_bias else 0
    )
    rest = embeddings + wide + layers * (2 * wide + biases)
    attention = [(heads, wide), (shared, wide), (shared, wide), (wide, heads)]
    forward = [(inner, wide), (inner, wide), (wide, inner)]
    return Size.of("language model", rest, [*attention, *forward] * layers)
