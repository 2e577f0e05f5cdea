"""The flags of ``blipq bulk submit``, and what they mean together."""

from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from blipq.bulk.journal import Journal
from blipq.bulk.manners import HOST_RATE, Manners
from blipq.bulk.start import journal_path
from blipq.cli import bulk
from blipq.contract import Kind, Priority
from blipq.errors import InvalidRequest
from blipq.s3.refusals import S3Refused
from blipq.s3.storage import Storage
from blipq.settings import Settings
from blipq.submission import checked
from blipq_datasets.recipe import Recipe, recipe_from
from blipq_datasets.sources.finding import ending_of
from blipq_datasets.sources.tars import PICTURES

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
SampleOption = Annotated[
    int, typer.Option(min=10, max=10_000, help="Rows of the sample, at random.")
]
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
    prefix: str | None = None
    template: Path | None = None
    recipe: Path | None
    kind: Kind | None
    question: list[str] | None
    text: list[str] | None
    prompt: str | None
    image_column: str | None
    id_column: str | None
    prompt_column: str | None
    to: str | None = None
    output: str | None = None
    escape_formulas: bool = False
    dry_run: bool = False
    update: bool = False
    journal: str | None
    window: int | None = None
    rate: float | None = None
    host_rate: float = HOST_RATE
    until: str | None = None
    model: str | None
    priority: Priority | None
    expires_in: str | None
    as_json: bool

    @property
    def manners(self) -> Manners:
        """How fast rows are submitted, and until when. Raises InvalidRequest."""
        return bulk.manners_of(self.rate, self.host_rate, self.until)

    @property
    def is_of_a_manifest(self) -> bool:
        """Whether a request stands in each line: without a flag of datasets, what is no dataset.

        Raises InvalidRequest, S3Unavailable.
        """
        if self._fields() or self.recipe or self.dry_run or self.update:
            return False
        if self.source is None:
            return self.prefix is not None
        if self.source.lower().endswith((".jsonl", ".ndjson")):
            return True
        path = journal_path(self.journal or self.source)
        if path.exists():
            with closing(Journal.open(path)) as journal:
                return not journal.fact("dataset")
        return _is_another_file(self.source)

    def chosen(self) -> Recipe:
        """The recipe, in which flags come first. Raises InvalidRequest."""
        options = {
            "model": self.model,
            "priority": self.priority,
            "expires_in": self.expires_in,
        }
        fields = {"source": self.source, "options": _given(options), **self._fields()}
        return recipe_from(self.recipe, fields).with_low_priority()

    @property
    def named(self) -> tuple[Recipe, str, Path]:
        """The recipe, its source, and the journal. Raises InvalidRequest."""
        recipe = self.chosen()
        if recipe.source is None:
            raise InvalidRequest("give a source, or a recipe that names one")
        return recipe, recipe.source, journal_path(self.journal or recipe.source)

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


def _is_another_file(source: str) -> bool:
    """Whether a file or an object is neither a picture nor has an ending of datasets."""
    suffix = source.lower().rpartition(".")[2]
    if source.endswith("/") or ending_of(source) is not None or suffix in PICTURES:
        return False
    if not source.startswith("s3://"):
        return Path(source).is_file()
    bucket, _, key = source.removeprefix("s3://").partition("/")
    with suppress(S3Refused):  # who may not list is refused what is not there
        return bool(key) and Storage(checked(Settings)).head(bucket, key) is not None
    return False


def _given(fields: dict[str, Any]) -> dict[str, Any] | None:
    return {name: value for name, value in fields.items() if value} or None
