"""Writes the HTTP door's description to docs/openapi.json: ``python -m tools.docs.openapi``."""

import json
import sys

from tools.docs import DOCS, write_or_check

from blipq_api.app import OPERATIONS
from blipq_api.reference import document

PAGE = DOCS / "openapi.json"

if __name__ == "__main__":
    text = json.dumps(document(OPERATIONS), indent=1) + "\n"
    sys.exit(write_or_check({PAGE: text}, "tools.docs.openapi"))
