"""What became of a row, as columns beside its own."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from blipq_datasets.journal import Outcome

#: Names of the columns that are added begin so; a dataset's own of such names are replaced.
PREFIX = "blipq_"

SCHEMA = pa.schema(
    [
        ("blipq_key", pa.string()),
        ("blipq_status", pa.string()),
        ("blipq_text", pa.string()),
        ("blipq_confidence", pa.float64()),
        ("blipq_answers", pa.list_(pa.string())),
        ("blipq_result", pa.string()),
        ("blipq_model", pa.string()),
        ("blipq_checkpoint", pa.string()),
        ("blipq_revision", pa.string()),
        ("blipq_job", pa.string()),
        ("blipq_error_code", pa.string()),
        ("blipq_error_message", pa.string()),
    ]
)


def with_answers(columns: pa.RecordBatch, outcomes: Sequence[Outcome]) -> pa.RecordBatch:
    """The columns of some rows and, in the same order, what became of them."""
    answers = pa.RecordBatch.from_pylist([_answer(each) for each in outcomes], schema=SCHEMA)
    own = [(n, field) for n, field in enumerate(columns.schema) if not _is_ours(field.name)]
    arrays = [columns.column(n) for n, _ in own]
    schema = pa.schema([*(field for _, field in own), *SCHEMA], metadata=columns.schema.metadata)
    return pa.RecordBatch.from_arrays([*arrays, *answers.columns], schema=schema)


def _is_ours(name: str) -> bool:
    return name.startswith(PREFIX)


def _answer(outcome: Outcome) -> dict[str, Any]:
    details = outcome.details
    result, error = details.get("result"), details.get("error") or {}
    receipt = details.get("receipt") or {}
    texts, confidence = texts_of(result) if result else ([], None)
    return {
        "blipq_key": outcome.key,
        "blipq_status": outcome.status,
        "blipq_text": texts[0] if texts else None,
        "blipq_confidence": confidence,
        "blipq_answers": texts,
        "blipq_result": json.dumps(result, ensure_ascii=False) if result else None,
        "blipq_model": details.get("model"),
        "blipq_checkpoint": receipt.get("checkpoint"),
        "blipq_revision": receipt.get("revision"),
        "blipq_job": outcome.job_id,
        "blipq_error_code": error.get("code"),
        "blipq_error_message": error.get("message"),
    }


def texts_of(result: Mapping[str, Any]) -> tuple[list[str], float | None]:
    """A result's texts, the most wanted first, and the probability or score of that one."""
    if captions := result.get("captions"):
        return [each["text"] for each in captions], captions[0].get("score")
    if answers := result.get("answers"):
        choices = answers[0].get("choices") or [{}]
        return [each["text"] for each in answers], choices[0].get("probability")
    if scores := result.get("scores"):
        best = sorted(scores, key=lambda each: -each["score"])
        return [each["text"] for each in best], best[0]["score"]
    parts = [result.get(name) for name in ("caption", "vqa", "match")]
    found = [texts_of(part) for part in parts if part]
    return [text for texts, _ in found for text in texts], found[0][1] if found else None
