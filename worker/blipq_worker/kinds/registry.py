"""The specs of all kinds, each from the module with the kind's name."""

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from blipq.contract import Kind, Request
from blipq_worker.kinds.spec import KindSpec

SPECS: Mapping[Kind, KindSpec[Any]] = {
    kind: import_module(f"blipq_worker.kinds.{kind.value}").SPEC for kind in Kind
}


def spec_of(request: Request) -> KindSpec[Any]:
    """The spec of a request's kind."""
    return SPECS[Kind(request.kind)]
