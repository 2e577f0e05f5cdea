"""What pydantic found wrong with a caller's text, in blipq's words.

pydantic writes for whoever declared the model ("Tuple should have at least 2 items after
validation, not 1"); whoever reads it here wrote a request, a manifest or a variable.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

from blipq.contract.base import HALF_A_PAIR, NAME_PATTERN, Kind

_NAME = (
    "a name is letters, digits, '.', '_' and '-', at most 64 of them, and begins with a letter or "
    "a digit"
)
_TEXT = "must be a text"
_WHOLE = "must be a whole number"
_NUMBER = "must be a number"
_YES_OR_NO = "must be true or false"
_LIST = "must be a list"
_OBJECT = "must be an object with named fields"

_FIXED = {
    "missing": "missing",
    "string_type": _TEXT,
    "string_unicode": HALF_A_PAIR,
    "int_type": _WHOLE,
    "int_parsing": _WHOLE,
    "int_parsing_size": _WHOLE,
    "int_from_float": _WHOLE,
    "float_type": _NUMBER,
    "float_parsing": _NUMBER,
    "finite_number": "must be a finite number",
    "bool_type": _YES_OR_NO,
    "bool_parsing": _YES_OR_NO,
    "tuple_type": _LIST,
    "list_type": _LIST,
    "dict_type": _OBJECT,
    "model_type": _OBJECT,
    "model_attributes_type": _OBJECT,
}


def _least(ctx: Mapping[str, Any]) -> str:
    least = ctx["min_length"]
    return "must not be empty" if least == 1 else f"needs at least {least:,}{_found(ctx)}"


def _most(ctx: Mapping[str, Any]) -> str:
    return f"takes at most {ctx['max_length']:,}{_found(ctx)}"


def _found(ctx: Mapping[str, Any]) -> str:
    actual = ctx.get("actual_length")
    return "" if actual is None else f", not {actual:,}"


def _characters(ctx: Mapping[str, Any]) -> str:
    if ctx.get("min_length") == 1:
        return "must not be empty"
    return f"needs at least {ctx['min_length']:,} characters"


def _one_of(ctx: Mapping[str, Any]) -> str:
    return f"must be {str(ctx['expected']).replace(chr(39), '')}"


def _tag(ctx: Mapping[str, Any]) -> str:
    return str(ctx["discriminator"]).strip("'")


def _kind(ctx: Mapping[str, Any]) -> str:
    known = re.findall(r"'(\w+)'", str(ctx["expected_tags"]))
    return f"{_tag(ctx)} must be one of {', '.join(known)}, not {ctx['tag']!r}"


def _bound(words: str, name: str) -> Callable[[Mapping[str, Any]], str]:
    def text(ctx: Mapping[str, Any]) -> str:
        bound = ctx[name]
        whole = isinstance(bound, (int, float)) and bound == int(bound)
        return f"{words} {int(bound):,}" if whole else f"{words} {bound}"

    return text


_COMPUTED: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "string_too_short": _characters,
    "string_too_long": lambda ctx: f"takes at most {ctx['max_length']:,} characters",
    "too_short": _least,
    "too_long": _most,
    "greater_than": _bound("must be greater than", "gt"),
    "greater_than_equal": _bound("must be at least", "ge"),
    "less_than": _bound("must be less than", "lt"),
    "less_than_equal": _bound("must be at most", "le"),
    "string_pattern_mismatch": lambda ctx: f"must be of the form {ctx['pattern']}",
    "enum": _one_of,
    "literal_error": _one_of,
    "union_tag_invalid": _kind,
    "union_tag_not_found": lambda ctx: f"{_tag(ctx)} is missing: one of {', '.join(Kind)}",
}


def sentence(error: Mapping[str, Any]) -> str:
    """The text of one of pydantic's errors, without the field's name."""
    kind, ctx = error["type"], error.get("ctx", {})
    if kind == "string_pattern_mismatch" and ctx["pattern"] == NAME_PATTERN:
        return _NAME
    if kind in _COMPUTED:
        return _COMPUTED[kind](ctx)
    return _FIXED.get(kind) or str(error["msg"]).removeprefix("Value error, ")
