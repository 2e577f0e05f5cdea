"""The flags of ``blipq bulk submit``, and what they mean together."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from blipq.cli import bulk
from blipq.contract import Kind, Priority
from blipq_datasets.recipe import Recipe, recipe_from

Source = Annotated[
    str | None,
    typer.Argument(
        help="A file, folder, s3:// object or prefix: pictures, tars, Parquet, CSV, JSON lines."
    ),
]
PrefixOption = Annotated[
    str | None, typer.Option(metavar="S3-URI", help="Instead: a request per object under it.")
]
TemplateOption = Annotated[
    Path | None, typer.Option(help="With --prefix: the request, as JSON without its image.")
]
RecipeOption = Annotated[
    Path | None, typer.Option(help="A file of TOML with these options and a request.")
]
KindOption = Annotated[
    Kind | None, typer.Option(metavar="KIND", help="caption, vqa, match, embed or describe.")
]
QuestionOption = Annotated[
    list[str] | None, typer.Option(help="A question to each picture; may be repeated.")
]
TextOption = Annotated[
    list[str] | None, typer.Option(help="A text to score against each; may be repeated.")
]
PromptOption = Annotated[str | None, typer.Option(help="How each caption begins.")]
ImageColumnOption = Annotated[
    str | None, typer.Option(metavar="NAME", help="The pictures: URIs, paths or bytes.")
]
IdColumnOption = Annotated[
    str | None, typer.Option(metavar="NAME", help="The rows' keys, each once.")
]
PromptColumnOption = Annotated[
    str | None, typer.Option(metavar="NAME", help="A prompt, question or text for each row.")
]
ToOption = Annotated[
    str | None, typer.Option(metavar="KIND", help="parquet (default), jsonl, csv or webdataset.")
]
OutputOption = Annotated[
    str | None,
    typer.Option(metavar="FOLDER", help="Where answered shards go: a folder or s3:// prefix."),
]
EscapeOption = Annotated[bool, typer.Option(help="In CSV: ' before what a spreadsheet would run.")]
DryRunOption = Annotated[
    bool, typer.Option(help="Show the requests of the first three rows, and submit nothing.")
]
UpdateOption = Annotated[
    bool, typer.Option(help="Begin a run anew that is over: submit only what has changed.")
]
JournalOption = Annotated[
    str | None, typer.Option(help="What became of each row; by default SOURCE.bulk here.")
]
WindowOption = Annotated[int | None, typer.Option(min=1, help=bulk.WINDOW_HELP)]
ModelOption = Annotated[
    str | None, typer.Option(help="Served model of rows or lines that name none.")
]
PriorityOption = Annotated[
    Priority | None, typer.Option(metavar="PRIORITY", help="high, normal or (default) low.")
]
ExpiresOption = Annotated[str | None, typer.Option(help="Their deadline, such as 2d.")]


@dataclass(frozen=True, slots=True, kw_only=True)
class Flags:
    """All of them, as they were given."""

    source: str | None
    prefix: str | None
    template: Path | None
    recipe: Path | None
    kind: Kind | None
    question: list[str] | None
    text: list[str] | None
    prompt: str | None
    image_column: str | None
    id_column: str | None
    prompt_column: str | None
    to: str | None
    output: str | None
    escape_formulas: bool
    dry_run: bool
    update: bool
    journal: str | None
    window: int | None
    model: str | None
    priority: Priority | None
    expires_in: str | None
    as_json: bool

    @property
    def is_of_a_manifest(self) -> bool:
        """Whether a request stands in each line: JSON lines, without a flag of datasets."""
        if self.source is None:
            could_be = self.prefix is not None
        else:
            could_be = self.source.lower().endswith((".jsonl", ".ndjson"))
        return could_be and not (self._fields() or self.recipe or self.dry_run or self.update)

    def chosen(self) -> Recipe:
        """The recipe, in which flags come first. Raises InvalidRequest."""
        options = {
            "model": self.model,
            "priority": self.priority,
            "expires_in": self.expires_in,
        }
        fields = {"source": self.source, "options": _given(options), **self._fields()}
        return recipe_from(self.recipe, fields).with_low_priority()

    def _fields(self) -> dict[str, Any]:
        """Those that a manifest has no use for, as a recipe names them."""
        request = {
            "kind": self._kind(),
            "prompt": self.prompt,
            "questions": self.question,
            "texts": self.text,
        }
        fields = {
            "image_column": self.image_column,
            "id_column": self.id_column,
            "prompt_column": self.prompt_column,
            "to": self.to,
            "output": self.output,
            "escape_formulas": self.escape_formulas or None,
            "request": _given(request),
        }
        return {name: value for name, value in fields.items() if value is not None}

    def _kind(self) -> str | None:
        if self.kind is not None:
            return str(self.kind)
        return "vqa" if self.question else "match" if self.text else None


def _given(fields: dict[str, Any]) -> dict[str, Any] | None:
    return {name: value for name, value in fields.items() if value} or None
