"""What writes the generated pages of docs/. Each takes ``--check``: exit 1 if a page is stale."""

import re
import sys
from collections.abc import Mapping
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"


def write_or_check(pages: Mapping[Path, str], command: str) -> int:
    """Writes the pages, or prints which of them are stale; the exit code."""
    if "--check" not in sys.argv[1:]:
        for path, text in pages.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return 0
    stale = [path for path, text in pages.items() if not path.exists() or path.read_text() != text]
    for path in stale:
        print(f"{path} is stale: python -m {command}", file=sys.stderr)
    return 1 if stale else 0


def with_section(page: str, name: str, text: str) -> str:
    """The page with the text between its marks of that name."""
    begin, end = f"<!-- begin: {name} -->", f"<!-- end: {name} -->"
    section = f"(?s){re.escape(begin)}.*?{re.escape(end)}"
    new, count = re.subn(section, lambda _: f"{begin}\n{text}\n{end}", page)
    if count != 1:
        raise ValueError(f"{count} sections {name!r}, not one")
    return new
