"""The checkpoint that gives what a LAVIS file has not: configuration, tokenizer, frozen weights."""

from collections.abc import Collection, Mapping
from typing import Any

from blipq_worker.catalog.models import KNOWN_MODELS, VARIANTS, served_model
from blipq_worker.conversion.contents import ConversionError
from blipq_worker.inference.requests import Family

#: Prefixes of weights' names that show the kind of a model, first those that are not converted.
_FOREIGN = {
    "llm_": "InstructBLIP's or X-InstructBLIP's, with a Llama, which is not converted",
    "visual_encoder.transformer.": "one with CLIP's ViT-L as its tower, which is not converted",
}
_KINDS: dict[str, Family] = {
    **dict.fromkeys(("opt_proj.", "opt_model."), "opt"),
    **dict.fromkeys(("t5_proj.", "t5_model."), "t5"),
    **dict.fromkeys(("itm_head.", "vision_proj.", "text_proj."), "retrieval"),
}
_READS_TEXT = "Qformer.bert.embeddings.word_embeddings.weight"

#: By the kind of the language model and the width of its states.
_PUBLISHED: dict[tuple[Family, int], str] = {
    ("opt", 2560): "Salesforce/blip2-opt-2.7b",
    ("opt", 4096): "Salesforce/blip2-opt-6.7b",
    ("t5", 2048): "Salesforce/blip2-flan-t5-xl",
    ("t5", 4096): "Salesforce/blip2-flan-t5-xxl",
}
_RETRIEVAL = "Salesforce/blip2-itm-vit-g"


def family_of(names: Collection[str]) -> Family:
    """What kind of model has weights of these names. Raises ConversionError."""
    for beginning, what in _FOREIGN.items():
        if any(name.startswith(beginning) for name in names):
            raise ConversionError(f"the file's model is {what}")
    for beginning, family in _KINDS.items():
        if any(name.startswith(beginning) for name in names):
            # The Q-Former of BLIP-2's captions has no words: here it reads the instruction.
            if family != "retrieval" and _READS_TEXT in names:
                raise ConversionError("the file's model is InstructBLIP's, which is not converted")
            return family
    raise ConversionError(
        "the file has no weights of a BLIP-2 model: neither opt_proj nor t5_proj nor itm_head, but "
        f"{len(names)} others, such as {', '.join(sorted(names)[:3])}"
    )


def base_of(
    given: str | None,
    family: Family,
    shapes: Mapping[str, tuple[int, ...]],
    model: Mapping[str, Any],
) -> str:
    """The base's hub id or folder: as it was given, or the published one that the file began from.

    shapes: of the file's weights, by LAVIS's names. model: LAVIS's configuration of it.
    Raises ConversionError where none is known.
    """
    if given is None:
        return _published(family, shapes, model)
    if given in (*KNOWN_MODELS, "demo"):
        served = served_model(given, given)
        return (served.retrieval if family == "retrieval" else None) or served.generation
    return given


def _published(
    family: Family, shapes: Mapping[str, tuple[int, ...]], model: Mapping[str, Any]
) -> str:
    width = shapes.get(f"{family}_proj.weight", (0,))[0]
    name = _RETRIEVAL if family == "retrieval" else _PUBLISHED.get((family, width))
    if name is None:
        raise ConversionError(
            f"no published model has a language model that is {width} wide: name a base (--base)"
        )
    # What LAVIS loads before it trains, by its configuration: of COCO's models the tower is tuned.
    from_coco = "coco" in str(model.get("model_type")) and model.get("load_finetuned", True)
    return f"{name}-coco" if from_coco and f"{name}-coco" in VARIANTS else name
