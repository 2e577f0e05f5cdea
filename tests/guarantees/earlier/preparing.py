"""Prints what the version before stores of jobs; reads ``[[request, options], ...]``."""

import json
import sys
from typing import Any

from blipq.records import prepare
from blipq.requests import Submission

from blipq.contract import Options, request_adapter
from blipq.settings import Settings


def stored(request: Any, options: Any) -> dict[str, str]:
    parsed = request_adapter.validate_python(request), Options.model_validate(options)
    arguments = prepare(Submission(*parsed, "job_1"), Settings(), notify="me").arguments
    _, digest, key, expires_in, _, *fields = map(str, arguments)
    pairs = dict(zip(fields[::2], fields[1::2], strict=True))
    return pairs | {"digest": digest, "key": key, "expires_in": expires_in}


if __name__ == "__main__":
    print(json.dumps([stored(*each) for each in json.load(sys.stdin)]))
