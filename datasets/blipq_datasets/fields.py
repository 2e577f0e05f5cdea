"""What kind of values a column of objects has, the same as Arrow types, and back again."""

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pyarrow as pa

#: Names of columns and their kinds: null, bool, int, float, text or json.
Fields = dict[str, str]

MOST_FIELDS = 512
#: Columns that a shard of objects has, and the characters of a name; further ones are left out.
MOST_COLUMNS, LONGEST_NAME = 4096, 512

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
    """The kinds that hold these as well, of no more than MOST_COLUMNS columns."""
    more: Fields = {}
    for name, kind in kinds.items():
        is_new = name not in fields
        if is_new and (len(fields) + len(more) >= MOST_COLUMNS or len(name) > LONGEST_NAME):
            continue
        wider = _wider(fields.get(name, "null"), kind)
        if is_new or wider != fields[name]:
            more[name] = wider
    return {**fields, **more} if more else fields


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


def objects_of(rows: pa.RecordBatch) -> Iterator[tuple[dict[str, Any], list[str]]]:
    """Rows as objects, and which of their columns hold texts that are not UTF-8, which are None.

    Times are texts: Python's have neither nanoseconds nor all years.
    """
    rows = _with_texts(rows)
    try:
        found = rows.to_pylist()
    except UnicodeDecodeError:
        yield from (_object_of(rows, number) for number in range(len(rows)))
    else:
        yield from ((each, []) for each in found)


def _object_of(rows: pa.RecordBatch, number: int) -> tuple[dict[str, Any], list[str]]:
    found: dict[str, Any] = {}
    bad = []
    for name, column in zip(rows.schema.names, rows.columns, strict=True):
        try:
            found[name] = column[number].as_py()
        except UnicodeDecodeError:
            found[name] = None
            bad.append(name)
    return found, bad


def _with_texts(rows: pa.RecordBatch) -> pa.RecordBatch:
    """The same with texts for times, also within lists and structs; those of a zone are in UTC."""
    arrays = []
    for column in rows.columns:
        for change in (_in_utc, _as_text):
            kind = _changed(column.type, change)
            column = column if kind == column.type else column.cast(kind)
        arrays.append(column)
    schema = [field.with_type(array.type) for field, array in zip(rows.schema, arrays, strict=True)]
    return pa.RecordBatch.from_arrays(arrays, schema=pa.schema(schema))


def _changed(kind: pa.DataType, change: Callable[[pa.DataType], pa.DataType]) -> pa.DataType:
    """A type in which all types of single values are changed."""
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(_changed(field.type, change)) for field in kind])
    if pa.types.is_list(kind):
        return pa.list_(_changed_item(kind, change))
    if pa.types.is_large_list(kind):
        return pa.large_list(_changed_item(kind, change))
    if pa.types.is_fixed_size_list(kind):
        return pa.list_(_changed_item(kind, change), kind.list_size)
    if pa.types.is_map(kind):
        return pa.map_(_changed(kind.key_type, change), _changed(kind.item_type, change))
    if pa.types.is_dictionary(kind):
        changed = _changed(kind.value_type, change)
        return kind if changed == kind.value_type else changed
    return change(kind)


def _changed_item(kind: Any, change: Callable[[pa.DataType], pa.DataType]) -> pa.Field:
    item: pa.Field = kind.value_field
    return item.with_type(_changed(item.type, change))


def _in_utc(kind: pa.DataType) -> pa.DataType:
    """Not every zone of a file is known here."""
    has_zone = pa.types.is_timestamp(kind) and kind.tz is not None
    return pa.timestamp(kind.unit, "UTC") if has_zone else kind


def _as_text(kind: pa.DataType) -> pa.DataType:
    return pa.string() if pa.types.is_temporal(kind) else kind
