"""What kind of values a column of objects has, found row by row, and the same as Arrow types."""

import json
from collections.abc import Mapping
from typing import Any

import pyarrow as pa

#: Names of columns and their kinds: null, bool, int, float, text or json.
Fields = dict[str, str]

MOST_FIELDS = 512

_TYPES: Mapping[str, pa.DataType] = {
    "null": pa.null(),
    "bool": pa.bool_(),
    "int": pa.int64(),
    "float": pa.float64(),
    "text": pa.string(),
    "json": pa.string(),
}
#: Marks a column of texts that are JSON of another kind of values.
_IS_JSON = {b"blipq": b"json"}


def kind_of(value: Any) -> str:
    """The kind of one value."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int):
        return "int" if -(2**63) <= value < 2**63 else "json"
    if isinstance(value, float):
        return "float"
    return "text" if isinstance(value, str) else "json"


def kinds_of(columns: Mapping[str, Any]) -> Fields:
    """The kinds of a row's values."""
    return {name: kind_of(value) for name, value in columns.items()}


def widened(fields: Fields, kinds: Fields) -> Fields:
    """The kinds that hold these as well."""
    more = {name: _wider(fields.get(name, "null"), kind) for name, kind in kinds.items()}
    return {**fields, **more}


def _wider(one: str, other: str) -> str:
    kinds = {one, other} - {"null"}
    if len(kinds) < 2:
        return kinds.pop() if kinds else "null"
    return "float" if kinds == {"int", "float"} else "json"


def cell(value: Any, kind: str) -> Any:
    """A value as its column holds it."""
    if value is None:
        return None
    if kind == "json":
        return json.dumps(value, ensure_ascii=False)
    return float(value) if kind == "float" else value


def schema_of(fields: Fields) -> pa.Schema:
    """The columns' types."""
    return pa.schema(
        [
            pa.field(name, _TYPES[kind], metadata=_IS_JSON if kind == "json" else None)
            for name, kind in fields.items()
        ]
    )


def is_json(column: pa.Field) -> bool:
    """Whether a column's texts are JSON that ``cell`` made."""
    return bool(column.metadata) and column.metadata.get(b"blipq") == b"json"
