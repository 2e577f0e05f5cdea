"""What duckdb finds in answers in Parquet, and webdataset in those in tars, as JSON.

A program of the peers' environment (``make peers``). ``tables ANSWERS [MADE]`` and ``tars ANSWERS``
take patterns of paths; MADE are the tables that img2dataset wrote beside its tars. A column
``expected``, where there is one, holds a row's answer, or null if it can have none.
"""

import glob
import hashlib
import json
import sys
from collections import Counter
from typing import Any

import duckdb
import webdataset

#: A row and its answer.
PAIRS = "from made join answer on made.key = answer.blipq_key"
COUNTS = (
    "select count(*), count(distinct blipq_key), "
    "count(*) filter (where blipq_status = 'succeeded') from answer"
)


def tables(answers: str, made: str | None = None) -> dict[str, Any]:
    """Counts of Parquet files, and how many rows differ from those that it was made of."""
    duckdb.sql(f"create view answer as from read_parquet('{answers}', union_by_name = true)")
    rows, keys, answered = duckdb.sql(COUNTS).fetchall()[0]
    found = {"rows": rows, "keys": keys, "with an answer": answered}
    if made is None:
        return {"found": found, "wrong": {}}
    duckdb.sql(f"create view made as from read_parquet('{made}') where status = 'success'")
    wrong = {
        "rows without an answer": "from made anti join answer on made.key = answer.blipq_key",
        "rows with two": "from (select 1 from answer group by blipq_key having count(*) > 1)",
        "answers of no row": "from answer anti join made on made.key = answer.blipq_key",
        "answers of another row": f"{PAIRS} where blipq_text is distinct from made.expected",
        "rows whose columns changed": f"{PAIRS} where {_changed()}",
        "errors in the wrong rows": (
            f"{PAIRS} where (blipq_error_code is null) = (made.expected is null)"
        ),
    }
    return {"found": found, "wrong": {what: _count(rows) for what, rows in wrong.items()}}


def _changed() -> str:
    """Whether an answer lacks a column of its row, or has another value there."""
    kept = set(_columns("answer"))
    return " or ".join(
        f'made."{name}"::varchar is distinct from answer."{name}"::varchar'
        if name in kept
        else "true"
        for name in _columns("made")
    )


def _columns(view: str) -> list[str]:
    return [each[0] for each in duckdb.sql(f"describe {view}").fetchall()]


def _count(rows: str) -> int:
    (found,) = duckdb.sql(f"select count(*) {rows}").fetchall()[0]
    return int(found)


def tars(answers: str) -> dict[str, Any]:
    """Counts of tars of img2dataset's samples, and how many hold what they should not."""
    keys: Counter[str] = Counter()
    answered = texts = pictures = 0
    for sample in webdataset.WebDataset(sorted(glob.glob(answers)), shardshuffle=False):
        row = json.loads(sample["json"])
        keys[sample["__key__"]] += 1
        answered += row["blipq_status"] == "succeeded"
        if "expected" in row:
            texts += sample["txt"].decode() != (row["expected"] or "")
        # A sample without a picture was downloaded as no bytes.
        digest = hashlib.sha256(sample.get("jpg", b"")).hexdigest()
        pictures += digest != row["sha256"]
    return {
        "found": {"rows": keys.total(), "keys": len(keys), "with an answer": answered},
        "wrong": {"samples with another text": texts, "samples with another picture": pictures},
    }


if __name__ == "__main__":
    kind, *places = sys.argv[1:]
    print(json.dumps({"tables": tables, "tars": tars}[kind](*places)))
