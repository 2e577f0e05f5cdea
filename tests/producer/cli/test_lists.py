"""Lists of jobs for people."""

from datetime import UTC, datetime
from typing import Any

import pytest

from blipq.cli.terminal.output import print_jobs
from blipq.contract import (
    DescribeResult,
    Hit,
    JobInfo,
    MatchResult,
    SearchResult,
    Skipped,
    TextScore,
)


def test_a_list_shows_of_hits_and_scores_the_best_first(capsys: pytest.CaptureFixture[str]) -> None:
    hits = (Hit(id="s3://photos/2024/red.jpg", itc=0.41, itm=0.93), Hit(id="dog", itc=0.38))
    scores = (TextScore(text="a dog", score=0.02), TextScore(text="a cat", score=0.97))
    results = [
        SearchResult(
            hits=hits, skipped=(Skipped(id="gone", code="image_not_found", message="no such key"),)
        ),
        SearchResult(hits=()),
        MatchResult(head="itm", scores=scores),
        DescribeResult(match=MatchResult(head="itm", scores=scores)),
    ]
    at = datetime.now(UTC)
    job: dict[str, Any] = {"id": "job_1", "model": "default", "created_at": at, "expires_at": at}
    job["status"] = "succeeded"
    print_jobs(
        [JobInfo.model_validate({**job, "kind": each.kind, "result": each}) for each in results],
        False,
    )
    said = [line.strip() for line in capsys.readouterr().out.splitlines()[1::2]]
    assert said == [
        "red.jpg itm 0.930; dog itc 0.380; 1 skipped",
        "no hits",
        "0.970 a cat; 0.020 a dog",
        "0.970 a cat; 0.020 a dog",
    ]
