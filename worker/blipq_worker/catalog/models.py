"""Served models: names for a generation checkpoint and the retrieval checkpoint beside it."""

import re
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from blipq.errors import BlipqError
from blipq_worker.inference.requests import Family


@dataclass(frozen=True)
class ServedModel:
    """What a served model's name stands for; a checkpoint is a hub id or a folder.

    Without a retrieval checkpoint, match jobs fail with model_unavailable.
    """

    name: str
    generation: str
    retrieval: str | None = None


@dataclass(frozen=True)
class KnownModel:
    """A model that can be served by its short name."""

    generation: str
    retrieval: str | None
    about: str


#: The side of the images that COCO's checkpoints see, in pixels, and what LAVIS puts before their
#: captions.
COCO_SIDE, COCO_PROMPT = 364, "a photo of"

#: What the authors ask InstructBLIP for in their evaluations of captions (arXiv 2305.06500).
INSTRUCTION = "A short image description:"

#: The folder, in an InstructBLIP's, of the tokenizer that its Q-Former reads with.
QFORMER_TOKENIZER = "qformer_tokenizer"


@dataclass(frozen=True)
class Variant:
    """A published checkpoint. parameters: tests/worker/serving/test_memory.py counts them.

    coco: fine-tuned on COCO at 364 pixels, vision tower included. The others see 224 pixels through
    one frozen tower, which they can share. instructed: an InstructBLIP.
    """

    family: Family
    coco: bool
    parameters: int
    instructed: bool = False

    @property
    def image_size(self) -> int:
        """The side of the square that it sees, in pixels."""
        return COCO_SIDE if self.coco else 224

    @property
    def default_prompt(self) -> str:
        """What comes before a caption without a prompt of the job."""
        if self.instructed:
            return INSTRUCTION
        return COCO_PROMPT if self.coco and self.family != "retrieval" else ""


_BASE, _COCO = "Salesforce/blip2-itm-vit-g", "Salesforce/blip2-itm-vit-g-coco"

#: Every published checkpoint of BLIP-2 and InstructBLIP by its hub id.
VARIANTS: dict[str, Variant] = {
    "Salesforce/blip2-opt-2.7b": Variant("opt", False, 3_744_761_856),
    "Salesforce/blip2-opt-6.7b": Variant("opt", False, 7_752_869_376),
    "Salesforce/blip2-opt-2.7b-coco": Variant("opt", True, 3_745_353_216),
    "Salesforce/blip2-opt-6.7b-coco": Variant("opt", True, 7_753_460_736),
    "Salesforce/blip2-flan-t5-xl": Variant("t5", False, 3_942_446_592),
    "Salesforce/blip2-flan-t5-xxl": Variant("t5", False, 12_229_596_672),
    "Salesforce/blip2-flan-t5-xl-coco": Variant("t5", True, 3_943_037_952),
    _BASE: Variant("retrieval", False, 1_172_032_258),
    _COCO: Variant("retrieval", True, 1_172_623_618),
    "Salesforce/instructblip-flan-t5-xl": Variant("t5", False, 4_022_969_088, True),
    "Salesforce/instructblip-flan-t5-xxl": Variant("t5", False, 12_310_119_168, True),
    "Salesforce/instructblip-vicuna-7b": Variant("llama", False, 7_913_210_624, True),
    "Salesforce/instructblip-vicuna-13b": Variant("llama", False, 14_191_448_832, True),
}

PARAMETERS = {hub_id: variant.parameters for hub_id, variant in VARIANTS.items()}

#: What can be served by a short name, with the retrieval checkpoint that shares its image size.
#: InstructBLIP has none: its worker writes, and does not match or embed.
KNOWN_MODELS: dict[str, KnownModel] = {
    "opt-2.7b": KnownModel("Salesforce/blip2-opt-2.7b", _BASE, "captions, short answers"),
    "opt-6.7b": KnownModel("Salesforce/blip2-opt-6.7b", _BASE, "captions, short answers"),
    "opt-2.7b-coco": KnownModel("Salesforce/blip2-opt-2.7b-coco", _COCO, "best COCO captions"),
    "opt-6.7b-coco": KnownModel("Salesforce/blip2-opt-6.7b-coco", _COCO, "COCO captions"),
    "flan-t5-xl": KnownModel("Salesforce/blip2-flan-t5-xl", _BASE, "questions, instructions"),
    "flan-t5-xxl": KnownModel("Salesforce/blip2-flan-t5-xxl", _BASE, "best answers"),
    "flan-t5-xl-coco": KnownModel("Salesforce/blip2-flan-t5-xl-coco", _COCO, "COCO captions"),
    **{
        f"instructblip-{name}": KnownModel(f"Salesforce/instructblip-{name}", None, about)
        for name, about in (
            ("flan-t5-xl", "instructions, answers"),
            ("flan-t5-xxl", "instructions, best short answers"),
            ("vicuna-7b", "instructions, detailed descriptions, chat"),
            ("vicuna-13b", "instructions, detailed descriptions, chat"),
        )
    },
}


def demo_folder() -> Path:
    """The demo model's checkpoints: a small BLIP-2 of a world of coloured shapes."""
    return Path(str(resources.files("blipq_worker.demo"))) / "models"


def served_model(name: str, what: str) -> ServedModel:
    r"""What ``what`` stands for: ``demo``, a known model, or ``generation[+retrieval]``.

    A plus in a folder's name is written ``\+``.
    """
    if what == "demo":
        folder = demo_folder()
        return ServedModel(name, str(folder / "opt"), str(folder / "itm"))
    known = KNOWN_MODELS.get(what)
    if known is not None:
        return ServedModel(name, known.generation, known.retrieval)
    generation, *rest = re.split(r"(?<!\\)\+", what, maxsplit=1)
    retrieval = "".join(rest)
    return ServedModel(name, _plain(generation), _plain(retrieval) or None)


def _plain(checkpoint: str) -> str:
    return checkpoint.replace("\\+", "+")


def one_line(text: str) -> str:
    """A text of another library's as one line, as the last words of a worker are."""
    return " ".join(line.strip() for line in text.splitlines())


class ModelError(BlipqError):
    """A served model cannot be loaded; the message is one line with the remedy."""

    def __init__(self, text: str) -> None:
        super().__init__(one_line(text))
