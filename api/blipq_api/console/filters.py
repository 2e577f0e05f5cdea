"""The filters of the list of jobs, as its form sends them."""

from collections.abc import Mapping

_PLAIN = ("status", "kind", "model")


def filters_of(given: Mapping[str, str]) -> dict[str, str]:
    """By their fields' names; "" is any. ``name`` and ``value`` are a pair of metadata."""
    found = {name: given.get(name, "").strip() for name in (*_PLAIN, "name")}
    return {**found, "value": given.get("value", "") if found["name"] else ""}


def query_of(filters: Mapping[str, str]) -> dict[str, str]:
    """The query of ``GET /v1/jobs`` for them."""
    query = {name: filters[name] for name in _PLAIN if filters[name]}
    return query | ({f"metadata.{filters['name']}": filters["value"]} if filters["name"] else {})
