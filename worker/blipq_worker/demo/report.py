"""The demo's report: one HTML file that needs nothing else, not even a network or JavaScript."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from statistics import median

from PIL import Image

import blipq
from blipq.files import whole_file
from blipq.images.heat import heat_of
from blipq.images.overlay import overlay
from blipq.local.stack import API_PORT
from blipq.pages import environment
from blipq_worker.demo.plots import stage_plot, throughput_plot
from blipq_worker.demo.score import PASS_SHARE, Answered, Run, Tally
from blipq_worker.demo.world import Demonstration, render, with_article


@dataclass(frozen=True)
class Card:
    """One picture of the gallery and the answers about it."""

    number: int
    picture: str
    alt: str
    answers: Sequence[Answered]

    @property
    def tally(self) -> Tally:
        return Tally(self.answers)

    @property
    def flawed(self) -> bool:
        """Whether something is not right."""
        return self.tally.right < self.tally.jobs


@dataclass(frozen=True)
class HeatMap:
    """Where the model looked for a text or a word."""

    text: str
    picture: str


def write_report(run: Run, path: Path) -> None:
    """Writes the report, whole or not at all."""
    with whole_file(path) as file:
        file.write(render_report(run).encode())


def render_report(run: Run) -> str:
    """The report as HTML."""
    made = environment("blipq_worker.demo")
    made.filters.update(number=number, milliseconds=milliseconds, percent=percent)
    return made.get_template("report.html").render(
        run=run,
        tally=run.tally,
        pass_share=PASS_SHARE,
        precision=precision(run),
        version=blipq.__version__,
        written=datetime.now().astimezone(),
        throughput=throughput_plot(run.ended_after()),
        stages=stage_plot(run.answers),
        batch_size=batch_size(run),
        cards=cards(run),
        heat_maps=heat_maps(run),
        door=f"http://127.0.0.1:{API_PORT}",
    )


def cards(run: Run) -> list[Card]:
    """The gallery, in the order submitted."""
    answers: list[list[Answered]] = [[] for _ in run.shown]
    for answer in run.answers:
        answers[answer.case.picture].append(answer)
    return [
        Card(place + 1, data_uri(render(shown.scene)), alt_text(shown), answers[place])
        for place, shown in enumerate(run.shown)
    ]


def heat_maps(run: Run) -> list[HeatMap]:
    """Where the model looked for a text and for each of its words; none where it did not say."""
    if run.explained is None or (maps := run.explained.scored.map) is None:
        return []
    picture = render(run.shown[run.explained.picture].scene)
    names = (run.explained.scored.text, *(run.explained.scored.words or ()))
    drawn = (overlay(picture, heat_of(maps, place), picture.size) for place in range(len(names)))
    return [HeatMap(name, data_uri(each)) for name, each in zip(names, drawn, strict=True)]


def data_uri(picture: Image.Image) -> str:
    """The picture as a JPEG inside a URI: a tenth of the PNG that the model was shown."""
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=88, subsampling=0)
    return f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}"


def alt_text(shown: Demonstration) -> str:
    """What the picture truly shows."""
    scene = shown.scene
    if not scene.shapes:
        return shown.caption.capitalize()
    return f"{shown.caption} on {with_article(scene.background)} background".capitalize()


def precision(run: Run) -> str:
    """Quantization and compute type in words."""
    receipt = run.receipt
    if receipt.dtype is None:
        return "unknown"
    weights = "weights not quantized"
    if receipt.quantization not in (None, "none"):
        weights = f"{receipt.quantization} weights"
    return f"{receipt.dtype}, {weights}"


def batch_size(run: Run) -> float | None:
    """The usual number of jobs in the pass of the model that a job was part of."""
    receipts = (answer.info.receipt for answer in run.answers)
    sizes = [receipt.batch_size for receipt in receipts if receipt and receipt.batch_size]
    return median(sizes) if sizes else None


# --- words ----------------------------------------------------------------------------------------


def number(value: float) -> str:
    """A number with three figures or so."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def percent(share: float) -> str:
    """A share of 1; never "100 %" for less than all."""
    tenths = int(share * 1000 + 1e-9)
    return f"{tenths // 10} %" if tenths % 10 == 0 else f"{tenths / 10} %"


def milliseconds(value: float | None) -> str:
    """A time, in the unit that reads best."""
    if value is None:
        return "–"
    if value >= 1000:
        return f"{value / 1000:.2f} s"
    return f"{value:.0f} ms" if value >= 10 else f"{value:.1f} ms"
