"""The request of each row, and where answers go: from flags or from a file of TOML."""

import json
import string
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from blipq.contract import Options, Request, request_adapter
from blipq.errors import InvalidRequest
from blipq.submission import checked, explain
from blipq_datasets.sources.columns import Columns

Format = Literal["parquet", "jsonl", "csv", "webdataset"]

#: Where the prompt column's value goes, and whether a list holds it.
_PROMPTS = {
    "caption": ("prompt", False),
    "vqa": ("questions", True),
    "match": ("texts", True),
    "describe": ("questions", True),
    "embed": ("text", False),
}
#: What the caller's options may not say: rows have ids and answers of their own.
_NOT_HERE = ("idempotency_key", "output", "metadata")


def _request(value: Any) -> Any:
    return {"kind": "caption", **value} if isinstance(value, Mapping) else value


def _known(value: Any) -> Any:
    if value == "lance":
        raise ValueError(
            "lance is not written: write parquet, and make a table of it (docs/datasets.md)"
        )
    return value


class Recipe(BaseModel):
    """The whole file. Texts in ``request`` may name columns: ``"is this a {color} car?"``.

    options: of every job, such as ``model``. to, output: the kind of files that answers go to, and
    the folder or prefix; without ``output`` they stay in the journal.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: str | None = None
    image_column: str | None = None
    id_column: str | None = None
    prompt_column: str | None = None
    request: Annotated[dict[str, Any], BeforeValidator(_request)] = Field(
        default_factory=lambda: {"kind": "caption"}
    )
    options: dict[str, Any] = Field(default_factory=dict)
    to: Annotated[Format, BeforeValidator(_known)] = "parquet"
    output: str | None = None
    escape_formulas: bool = False

    @property
    def columns(self) -> Columns:
        """Which columns rows must have."""
        prompt = {self.prompt_column} if self.prompt_column else set()
        needed = frozenset({*_named(self.request), *prompt})
        return Columns(self.image_column, self.id_column, needed=needed)

    @property
    def options_of_all(self) -> dict[str, Any]:
        """The options of every job. Raises InvalidRequest."""
        if wrong := sorted(set(_NOT_HERE).intersection(self.options)):
            raise InvalidRequest(f"options.{wrong[0]}: rows of a dataset have none")
        try:
            chosen = checked(Options, **self.options)
        except InvalidRequest as error:
            raise InvalidRequest(f"options.{error}") from None
        return chosen.model_dump(mode="json", exclude_defaults=True)

    def with_low_priority(self) -> "Recipe":
        """The same; where it names no priority, other jobs come first."""
        return self.model_copy(update={"options": {"priority": "low", **self.options}})

    def check(self) -> None:
        """Raises InvalidRequest for what no row could mend."""
        _ = self.options_of_all
        if "image" in self.request:
            raise InvalidRequest("request.image: leave it out: it is the row's picture")
        if "index" in self.request or self.request["kind"] == "search":
            raise InvalidRequest("request: datasets are not indexed: blipq index add does that")
        if self.prompt_column and self.request["kind"] not in _PROMPTS:
            raise InvalidRequest(f"request.kind: {self.request['kind']!r} is unknown")
        example = dict.fromkeys(self.columns.needed, "x")
        self.request_of(example, {"uri": "s3://sample/sample.jpg"})

    def request_of(self, columns: Mapping[str, Any], image: Mapping[str, Any]) -> dict[str, Any]:
        """The request of a row with these columns, as JSON. Raises InvalidRequest."""
        fields = {name: _filled(value, columns) for name, value in self.request.items()}
        if self.prompt_column:
            name, many = _PROMPTS[fields["kind"]]
            text = _text(self.prompt_column, columns)
            fields[name] = [text] if many else text
        try:
            request = request_adapter.validate_python({**fields, "image": image})
        except ValidationError as error:
            raise InvalidRequest(explain(error, Request)) from None
        chosen = request.model_dump(mode="json", exclude_defaults=True)
        return {**chosen, "kind": str(request.kind)}


def recipe_from(path: Path | None, flags: Mapping[str, Any]) -> Recipe:
    """A recipe of a file, of flags or of both; flags come first. Raises InvalidRequest."""
    fields = {} if path is None else _read(path)
    given = {name: value for name, value in flags.items() if value is not None}
    for table in ("request", "options"):
        if table in given:
            given[table] = {**fields.get(table, {}), **given[table]}
    try:
        recipe = Recipe.model_validate({**fields, **given})
    except ValidationError as error:
        raise InvalidRequest(f"{path or 'options'}: {explain(error, Recipe)}") from None
    recipe.check()
    return recipe


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text("utf-8-sig"))
    except OSError as error:
        raise InvalidRequest(f"cannot read {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"{path} is no TOML: {error}") from None


# --- templates: texts with {column} in them, anywhere in a request --------------------------------


def _named(value: Any) -> Iterator[str]:
    """The columns that templates name. Raises InvalidRequest for what is no template."""
    if isinstance(value, str):
        for _, name, spec, conversion in _parsed(value):
            if name is not None:
                if not name or spec or conversion or set(".[") & set(name):
                    raise InvalidRequest(f"{value!r}: between braces, a column; {{{{ is a brace")
                yield name
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from _named(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _named(each)


def _filled(value: Any, columns: Mapping[str, Any]) -> Any:
    if isinstance(value, str):
        return "".join(
            literal + ("" if name is None else _text(name, columns))
            for literal, name, _, _ in _parsed(value)
        )
    if isinstance(value, Mapping):
        return {name: _filled(each, columns) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_filled(each, columns) for each in value]
    return value


def _parsed(template: str) -> list[tuple[str, str | None, str | None, str | None]]:
    try:
        return list(string.Formatter().parse(template))
    except ValueError as error:
        raise InvalidRequest(f"{template!r}: {error}; write {{{{ for a brace") from None


def _text(name: str, columns: Mapping[str, Any]) -> str:
    value = columns.get(name)
    if value is None:
        raise InvalidRequest(f"the column {name!r} has no value")
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
