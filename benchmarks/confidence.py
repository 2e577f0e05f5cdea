"""What confidences are worth, and what loops the guard finds: ``python -m benchmarks.confidence``.

The demo model captions scenes of its world that it was not trained on, and answers questions about
them; what is right is known. For loops it writes without an end token, greedily and without
penalties. A text is a loop here by a rule that the guard does not use: of the four-token phrases in
its second half, at most a third differ.
"""

import argparse
import itertools
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tools.docs.page import replace_section

from benchmarks import results
from blipq_worker import demo
from blipq_worker.blip2 import Blip2, GenerateItem
from blipq_worker.blip2.decoding import DecodeLoop, Row
from blipq_worker.catalog.params import resolve
from blipq_worker.catalog.prompts import caption_prompt, vqa_prompt
from blipq_worker.demo.world import TEST_SEEDS, Demonstration, demonstration
from blipq_worker.demo.world.drawing import render
from blipq_worker.inference.requests import FinishReason, GenerationParams, OnLoop

PAGE = Path(__file__).parents[1] / "docs" / "confidence.md"
#: Ends of the bands of confidence in the table.
BANDS = (0.0, 0.6, 0.8, 0.9, 0.95, 0.98, 1.0)
#: Tokens of a text without an end.
LONG = 120
_AT_ONCE = 32
_PHRASE = 4


class Text(NamedTuple):
    """A text of the model, and whether it is right to the letter."""

    kind: str
    right: bool
    probability: float
    finish_reason: FinishReason | None


@dataclass(frozen=True, slots=True)
class Band:
    """Texts whose confidence is between two bounds."""

    least: float
    most: float
    texts: Sequence[Text]

    @property
    def confidence(self) -> float:
        """The mean of what the model says of them."""
        return sum(text.probability for text in self.texts) / len(self.texts)

    @property
    def right(self) -> float:
        """The share that is right."""
        return sum(text.right for text in self.texts) / len(self.texts)


def scenes(count: int, start: int = 20_000) -> Iterator[Demonstration]:
    """Scenes that no model was trained on."""
    return itertools.islice(map(demonstration, TEST_SEEDS[start:]), count)


def written(model: Blip2, shown: Sequence[Demonstration]) -> Iterator[Text]:
    """A caption and the answers of each scene, by a job's own parameters."""
    for start in range(0, len(shown), _AT_ONCE):
        some = shown[start : start + _AT_ONCE]
        for kind, items, truths in (_captions(model, some), _answers(model, some)):
            for texts, expected in zip(model.generate(items), truths, strict=True):
                for (text,), truth in zip(texts, expected, strict=True):
                    sure = text.mean_token_probability or 0.0
                    yield Text(kind, text.text == truth, sure, text.finish_reason)


def _captions(
    model: Blip2, some: Sequence[Demonstration]
) -> tuple[str, list[GenerateItem], list[list[str]]]:
    params = resolve("caption", model.info, {"on_loop": "end"})
    prompt = caption_prompt(None, model.info.default_prompt)
    items = [GenerateItem(model.preprocess(render(e.scene)), (prompt,), params) for e in some]
    return "caption", items, [[each.caption] for each in some]


def _answers(
    model: Blip2, some: Sequence[Demonstration]
) -> tuple[str, list[GenerateItem], list[list[str]]]:
    params = resolve("vqa", model.info, {"on_loop": "end"})
    items, truths = [], []
    for each in some:
        prompts = tuple(vqa_prompt(one.question, ()) for one in each.questions)
        items.append(GenerateItem(model.preprocess(render(each.scene)), prompts, params))
        truths.append([one.answer for one in each.questions])
    return "answer", items, truths


def bands(texts: Sequence[Text]) -> list[Band]:
    """The texts by their confidence; bands without any are left out."""
    found = []
    for least, most in itertools.pairwise(BANDS):
        inside = [
            text
            for text in texts
            if least <= text.probability < most or (most == 1.0 and text.probability >= 1.0)
        ]
        if inside:
            found.append(Band(least, most, inside))
    return found


class Endless(NamedTuple):
    """A text without an end token: all of it, and what the guard left of it; None: everything."""

    tokens: list[int]
    written: int
    kept: int | None

    @property
    def is_loop(self) -> bool:
        """Whether its second half says little new, by a rule that is not the guard's."""
        half = self.tokens[len(self.tokens) // 2 :]
        phrases = [tuple(half[at : at + _PHRASE]) for at in range(len(half) - _PHRASE + 1)]
        return len(set(phrases)) <= len(phrases) / 3


def endless(model: Blip2, shown: Sequence[Demonstration]) -> list[Endless]:
    """Texts about scenes, written past every end: freely, and with the guard."""
    free, guarded = _endless(model, shown, "keep"), _endless(model, shown, "end")
    return [
        Endless(whole.tokens, len(cut.tokens), cut.kept.get(0))
        for whole, cut in zip(free, guarded, strict=True)
    ]


def _endless(model: Blip2, shown: Sequence[Demonstration], on_loop: OnLoop) -> list[Row]:
    params = GenerationParams(num_beams=1, max_new_tokens=LONG, min_new_tokens=0, on_loop=on_loop)
    writer, rows = model.generator, []
    for start in range(0, len(shown), _AT_ONCE):
        some = shown[start : start + _AT_ONCE]
        queries = writer.project([model.preprocess(render(each.scene)) for each in some])
        for each, seen in zip(some, queries, strict=True):
            questions = (one.question for one in each.questions[:1])
            prompts = (model.info.default_prompt, *(vqa_prompt(text, ()) for text in questions))
            rows += [Row(seen, writer.ids(prompt), params) for prompt in prompts]
    run(DecodeLoop(writer.model.language_model, ends=(), slots=_AT_ONCE), rows)
    return rows


def run(loop: DecodeLoop, rows: Sequence[Row]) -> None:
    """Runs rows to their ends."""
    todo = list(rows)
    while todo or loop.running:
        coming: list[Row] = []
        while todo and loop.fits(todo[0], coming):
            coming.append(todo.pop(0))
        loop.join(coming)
        loop.step([row for row in loop.running if not row.ended])
        loop.leave([row for row in loop.running if row.ended])


def measured(count: int, endless_about: int) -> dict[str, Any]:
    """Bands of captions and answers, right texts that were cut, and loops."""
    torch.set_num_threads(2)
    model = Blip2.load(str(demo.OPT), dtype="float32")
    texts = list(written(model, list(scenes(count))))
    found = endless(model, list(scenes(endless_about)))
    loops = [each for each in found if each.is_loop]
    noticed = [each for each in loops if each.kept is not None]
    return {
        "texts": len(texts),
        "right": sum(text.right for text in texts),
        "cut": sum(text.right and text.finish_reason == "loop" for text in texts),
        "bands": {
            kind: [
                [band.least, band.most, len(band.texts), band.confidence, band.right]
                for band in bands([text for text in texts if text.kind == kind])
            ]
            for kind in ("caption", "answer")
        },
        "endless": len(found),
        "loops": len(loops),
        "noticed": len(noticed),
        "others cut": sum(each.kept is not None for each in found if not each.is_loop),
        "noticed after": sum(each.written for each in noticed) / max(1, len(noticed)),
    }


def calibration(found: Mapping[str, Any]) -> Iterator[str]:
    """The table of bands, in Markdown."""
    heading = "captions | their mean | right | answers | their mean | right"
    yield f"| `mean_token_probability` | {heading} |"
    yield "|---|---|---|---|---|---|---|"
    kinds = [
        {(least, most): rest for least, most, *rest in found["bands"][kind]}
        for kind in ("caption", "answer")
    ]
    for band in itertools.pairwise(BANDS):
        if not any(band in kind for kind in kinds):
            continue
        cells = [f"{band[0]:g} to {band[1]:g}"]
        for kind in kinds:
            count, confidence, right = kind.get(band, (0, 0.0, 0.0))
            cells += [f"{count:,}", f"{confidence:.3f}", f"{right:.1%}"] if count else ["0", "", ""]
        yield f"| {' | '.join(cells)} |"


def loops(found: Mapping[str, Any]) -> str:
    """What the guard noticed, in a sentence or two."""
    return (
        f"Of {found['endless']:,} texts of {LONG} tokens that the demo model wrote without an end, "
        f"{found['loops']:,} were loops by another rule than the guard's; it noticed "
        f"{found['noticed']:,} of them ({found['noticed'] / max(1, found['loops']):.1%}), after "
        f"{found['noticed after']:.0f} tokens on average. Of {found['right']:,} right captions and "
        f"answers it cut {found['cut']}."
    )


def main() -> None:
    """Measures, keeps the figures, and writes them into docs/confidence.md."""
    parser = argparse.ArgumentParser("python -m benchmarks.confidence", description=__doc__)
    parser.add_argument("--scenes", type=int, default=2_000)
    parser.add_argument("--loops", type=int, default=400, help="scenes written about endlessly")
    chosen = parser.parse_args()
    command = f"python -m benchmarks.confidence --scenes {chosen.scenes} --loops {chosen.loops}"
    found = results.measure(
        "confidence", lambda: measured(chosen.scenes, chosen.loops), command=command
    )
    table = [*calibration(found), "", results.source("confidence")]
    replace_section(PAGE, "calibration", "\n".join(table))
    replace_section(PAGE, "loops", "\n".join(textwrap.wrap(loops(found), 110)))
    print("\n".join([*table, loops(found)]))


if __name__ == "__main__":
    main()
