"""What transformers and LAVIS do differently, or silently wrong: a test for each.

The rest are elsewhere: that the image is seen at all and that no prompt is echoed (test_generation,
test_canary), types by part and T5's own output layer (test_loading), texts that lose their first
tokens and one image with many texts (test_retrieval), features by their LAVIS names
(test_embedding), features that are known (test_features).
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from blipq_worker.blip2 import Blip2, CheckpointError, GenerateItem
from blipq_worker.catalog.params import resolve

PROMPT = "a red circle above the blue square"


def texts(model: Blip2, picture: Image.Image, **overrides: Any) -> list[str]:
    params = resolve("caption", model.info, {"max_new_tokens": 12, **overrides})
    ((found,),) = model.generate([GenerateItem(model.preprocess(picture), (PROMPT,), params)])
    return [text.text for text in found]


def by_language_model(model: Blip2, picture: Image.Image, **parameters: Any) -> str:
    """LAVIS's call: queries and prompt as embeddings, without any ids that penalties could see."""
    generator = model.generator
    with torch.inference_mode():
        queries = generator.project([model.preprocess(picture)])
        embeds, mask = generator.prefix(queries, [generator.ids(PROMPT)])
        written = generator.model.language_model.generate(
            inputs_embeds=embeds, attention_mask=mask, do_sample=False, **parameters
        )
    return generator.text(written[0].tolist()[1 if model.info.family == "t5" else 0 :]).text


@pytest.mark.filterwarnings("ignore:Passing .* with `inputs_embeds`")
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("penalty", [{"repetition_penalty": 2.5}, {"no_repeat_ngram_size": 1}])
def test_penalties_count_what_was_written_and_not_the_prompt(
    either: Blip2, pictures: list[Image.Image], beams: int, penalty: dict[str, Any]
) -> None:
    minimum = 0 if either.info.family == "t5" else 1
    for picture in pictures:
        direct = by_language_model(
            either,
            picture,
            num_beams=beams,
            max_new_tokens=12,
            min_new_tokens=minimum,
            eos_token_id=either.generator._eos,
            **penalty,
        )
        assert texts(either, picture, num_beams=beams, **penalty) == [direct]


@pytest.mark.parametrize("name", ["opt", "t5"])
@pytest.mark.parametrize("beams", [1, 3])
def test_what_a_checkpoint_asks_of_generation_does_not_slip_in(
    request: pytest.FixtureRequest,
    checkpoints: dict[str, Path],
    tmp_path: Path,
    pictures: list[Image.Image],
    name: str,
    beams: int,
) -> None:
    """Parameters that a job does not set are LAVIS's, whatever lies in generation_config.json."""
    folder = Path(shutil.copytree(checkpoints[name], tmp_path / name))
    file = folder / "generation_config.json"
    asked = {"num_beams": 2, "max_new_tokens": 2, "repetition_penalty": 3.0, "length_penalty": -5.0}
    file.write_text(json.dumps({**json.loads(file.read_text()), **asked}))
    model = Blip2.load(str(folder), dtype="float32")
    plain: Blip2 = request.getfixturevalue(name)
    for picture in pictures:
        assert texts(model, picture, num_beams=beams) == texts(plain, picture, num_beams=beams)


def test_a_retrieval_revision_without_text_layers_is_refused(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    """Early revisions name the option otherwise, and transformers would drop the text layers."""
    folder = Path(shutil.copytree(checkpoints["itm"], tmp_path / "itm"))
    config = json.loads((folder / "config.json").read_text())
    del config["qformer_config"]["use_qformer_text_input"]
    config["qformer_config"]["qformer_text_input"] = True
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError):
        Blip2.load(str(checkpoints["opt"]), str(folder), dtype="float32")
