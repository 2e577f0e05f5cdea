"""Writes the contract as JSON Schemas to docs/schemas: ``python -m tools.docs.schemas``."""

import json
import re
import sys
from typing import Any, Literal

from pydantic import BaseModel
from tools.docs import DOCS, write_or_check

from blipq import contract

FOLDER = DOCS / "schemas"

RECEIVED: tuple[type[BaseModel], ...] = (
    contract.CaptionRequest,
    contract.VQARequest,
    contract.MatchRequest,
    contract.EmbedRequest,
    contract.DescribeRequest,
    contract.SearchRequest,
    contract.Options,
)
SENT: tuple[type[BaseModel], ...] = (
    contract.CaptionResult,
    contract.VQAResult,
    contract.MatchResult,
    contract.EmbedResult,
    contract.DescribeResult,
    contract.SearchResult,
    contract.JobInfo,
    contract.JobError,
    contract.Receipt,
)


def file_name(model: type[BaseModel]) -> str:
    """``VQARequest`` becomes ``vqa-request.json``."""
    words = re.findall(r"[A-Z]+(?=[A-Z][a-z])|[A-Z][a-z]+", model.__name__)
    return "-".join(words).lower() + ".json"


def _schema(model: type[BaseModel], mode: Literal["validation", "serialization"]) -> str:
    schema: dict[str, Any] = model.model_json_schema(mode=mode)
    if mode == "validation":
        _widen(schema, model)
    described = {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
    return json.dumps(described, indent=2) + "\n"


def _widen(schema: dict[str, Any], model: type[BaseModel]) -> None:
    """What the models also take: one text for a list, text for a duration."""
    for name, field in schema.get("properties", {}).items():
        if name in ("questions", "texts"):
            text = {"type": "string", "minLength": 1, "maxLength": 4096}
            if name in schema["required"]:
                field["minItems"] = 1  # pydantic checks it, and leaves it out of its schema
            schema["properties"][name] = {"anyOf": [text, field]}
        elif name == "expires_in":
            field["anyOf"] = [{"type": "string"}, *field["anyOf"]]


def pages() -> dict[Any, str]:
    """Every schema by its path."""
    received = {FOLDER / file_name(model): _schema(model, "validation") for model in RECEIVED}
    sent = {FOLDER / file_name(model): _schema(model, "serialization") for model in SENT}
    return {**received, **sent}


if __name__ == "__main__":
    sys.exit(write_or_check(pages(), "tools.docs.schemas"))
