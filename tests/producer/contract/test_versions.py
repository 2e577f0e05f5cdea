"""Which contract a job needs: what workers of an earlier one would refuse is left to newer ones."""

from typing import Any

import pytest

from blipq.contract import Options, contract_of, request_adapter

LONG = "x" * 513
PART = {"uri": "s3://photos/a.tar", "etag": "x", "offset": 512, "length": 9}


@pytest.mark.parametrize(
    ("request_", "options", "contract"),
    [
        ({"kind": "caption", "image": "s3://photos/cat.jpg"}, {}, 1),
        ({"kind": "caption", "image": "https://Photos.example/cat.jpg"}, {}, 1),
        ({"kind": "caption", "image": "s3://photos/A_b.jpg"}, {"metadata": {"a": LONG}}, 1),
        ({"kind": "embed", "mode": "text", "text": "a cat"}, {}, 1),
        ({"kind": "embed", "image": "s3://p-1/a", "index": "Shop_1"}, {}, 1),
        ({"kind": "search", "index": "shop", "text": "a", "filter": {"a": ["b", "c"]}}, {}, 1),
        ({"kind": "caption", "image": "s3://Photos/cat.jpg"}, {}, 2),
        ({"kind": "vqa", "image": "s3://my_photos/cat.jpg", "questions": ["q"]}, {}, 2),
        ({"kind": "search", "index": "shop", "image": "s3://A_b/c"}, {}, 2),
        ({"kind": "caption", "image": "s3://photos/a"}, {"output": "s3://My_results/a"}, 2),
        (
            {"kind": "embed", "image": "s3://photos/a"}
            | {"index": {"name": "shop", "metadata": {"a": LONG}}},
            {},
            2,
        ),
        ({"kind": "search", "index": "shop", "text": "a", "filter": {"a": ["b", LONG]}}, {}, 2),
        ({"kind": "search", "index": "shop", "text": "a", "filter": {"a": LONG}}, {}, 2),
        ({"kind": "caption", "image": PART}, {}, 3),
        ({"kind": "search", "index": "shop", "image": PART}, {}, 3),
        ({"kind": "match", "image": "s3://photos/a", "texts": "a", "explain": True}, {}, 3),
        ({"kind": "caption", "image": "s3://photos/a", "generation": {"num_beams": 2}}, {}, 1),
        ({"kind": "caption", "image": "s3://photos/a", "min_confidence": 0.0}, {}, 4),
        ({"kind": "caption", "image": PART, "generation": {"on_loop": "end"}}, {}, 4),
        ({"kind": "describe", "image": "s3://photos/a", "generation": {"logprobs": False}}, {}, 4),
        (
            {"kind": "vqa", "image": "s3://photos/a", "questions": "q"}
            | {"choices": ["a", "b"], "min_confidence": 0.5},
            {},
            4,
        ),
    ],
)
def test_a_job_needs_the_lowest_contract_whose_workers_take_it(
    request_: dict[str, Any], options: dict[str, Any], contract: int
) -> None:
    request = request_adapter.validate_python(request_)
    assert contract_of(request, Options(**options)) == contract
