"""A front counts tokens as the engine's model does, without the model."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from blipq.errors import PermanentError
from blipq_worker.blip2 import Blip2
from blipq_worker.engine.backend import failure_of
from blipq_worker.engine.verbs import as_model_item
from blipq_worker.inference.interface import ItemFailed
from blipq_worker.inference.requests import (
    Embed,
    Failure,
    Generate,
    GenerationParams,
    ImagePixels,
    Item,
    Match,
    ModelInfo,
    Rank,
    Rerank,
)
from blipq_worker.reading import Readers

IMAGE = ImagePixels("a" * 64)
TEXTS = (
    "",
    " ",
    "a photo of",
    "  Spaces   and\ttabs\n",
    "</s> <pad> <unk> <image> [CLS] [SEP] [MASK]",
    "Ünïcode: \U0001f408 \u732b \u200d \ufb01 e\u0301",
    "A Photo; of (many) *words*: " * 30,
)


def verdict(model: Blip2, item: Item) -> Failure | None:
    try:
        model.check(as_model_item(item))
    except PermanentError as error:
        return failure_of(error)
    return None


def counted(readers: Readers, info: ModelInfo, item: Item) -> Failure | None:
    try:
        readers.check(info, item)
    except ItemFailed as error:
        return error.failure
    return None


@pytest.fixture(params=["opt", "t5", "demo", "twin", "instructed_t5", "instructed_llama"])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Blip2]:
    """All families, with random and with trained weights, and their tokenizers in files."""
    from worker.in_flight import DEMO, T5_TWIN

    folders = {"demo": DEMO, "twin": T5_TWIN}
    name = request.param
    loaded: Blip2 = (
        Blip2.load(str(folders[name]), dtype="float32")
        if name in folders
        else request.getfixturevalue(name)
    )
    before = loaded.info
    loaded.write_readings(tmp_path, "default")
    yield loaded
    loaded.info = before


def texts_near(model: Blip2, limit: int) -> Iterator[str]:
    """Texts just within and just beyond a number of tokens."""
    one = "a"
    beyond = next(n for n in range(1, 10_000) if len(model.generator.ids(f"{one} " * n)) > limit)
    for count in (beyond - 2, beyond - 1, beyond, beyond + 1):
        yield f"{one} " * count


def items(model: Blip2) -> Iterator[Item]:
    room = model.info.room(20)
    for text in (*TEXTS, *texts_near(model, room)):
        for new in (1, 20, 512):
            yield Generate(IMAGE, (text, "a"), GenerationParams(max_new_tokens=new))
        yield Rank(IMAGE, (text,), ("yes", " no ", "what is the question? " * 5))
        yield Rank(IMAGE, ("a photo of",), (text, "yes"))
        yield Match(IMAGE, (text,))
        yield Rerank(IMAGE, text)
        yield Embed("text", None, text)
        yield Embed("multimodal", IMAGE, text)
    for count in range(1, 60, 7):
        yield Embed("text", None, " ".join(["\U0001f408 extraordinarily"] * count))
    yield Embed("image", IMAGE)


def test_a_front_and_the_engine_judge_every_item_alike(model: Blip2) -> None:
    readers = Readers()
    verdicts = set()
    for item in items(model):
        expected = verdict(model, item)
        assert counted(readers, model.info, item) == expected, item
        verdicts.add((type(item).__name__, None if expected is None else expected.code))
    assert {("Generate", None), ("Generate", "invalid_request")} <= verdicts
    assert {("Rank", None), ("Rank", "invalid_request")} <= verdicts
    lacking = "model_unavailable" if model.embedder is None else None
    assert ("Match", lacking) in verdicts


def test_a_text_that_is_too_long_to_embed_is_refused_alike(opt: Blip2, tmp_path: Path) -> None:
    before = opt.info
    opt.write_readings(tmp_path, "default")
    try:
        codes = set()
        for count in range(1, 600, 13):
            item = Embed("text", None, "?" * count)
            expected = verdict(opt, item)
            assert counted(Readers(), opt.info, item) == expected
            codes.add(None if expected is None else expected.code)
        assert codes == {None, "invalid_request"}
    finally:
        opt.info = before


def test_a_checkpoints_own_file_will_do(checkpoints: dict[str, Path], opt: Blip2) -> None:
    assert Path(opt.info.reading.tokenizer) == checkpoints["opt"]
    item = Generate(IMAGE, ("a " * 500,), GenerationParams())
    assert counted(Readers(), opt.info, item) == verdict(opt, item) is not None


def test_counting_tokens_imports_no_torch_and_no_transformers() -> None:
    code = (
        "import sys, blipq_worker.reading\n"
        "print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"
