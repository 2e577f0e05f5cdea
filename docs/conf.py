"""The documentation's site: ``make site`` builds it into ``docs/_build``; a warning is an error."""

from pathlib import Path

from pygments.lexers.special import TextLexer
from sphinx.application import Sphinx

import blipq

DOCS = Path(__file__).parent
#: Pages that lie in the root of the clone, where their readers look for them.
ROOT_PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")

project = "blipq"
version = release = blipq.__version__
copyright = "the authors of blipq"

extensions = ["myst_parser", "sphinx.ext.autodoc"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "blipq"
html_show_sphinx = False
myst_heading_anchors = 4
default_role = "code"
autodoc_member_order = "bysource"
autodoc_default_options = {
    "members": True,
    "undoc-members": True,
    "exclude-members": "model_config, model_post_init",
}


def _copy_root_pages() -> None:
    """Copies of them, with links as seen from where they lie."""
    folder = DOCS / "_root"
    folder.mkdir(exist_ok=True)
    for name in ROOT_PAGES:
        text = (DOCS.parent / name).read_text("utf-8")
        text = text.replace("](docs/", "](../").replace("](LICENSE)", "](../../LICENSE)")
        copy = folder / name.lower()
        if not copy.exists() or copy.read_text("utf-8") != _linked(text):
            copy.write_text(_linked(text), "utf-8")


def _linked(text: str, folder: str = "") -> str:
    """A page whose links to those pages lead to their copies in a folder."""
    for name in ROOT_PAGES:
        for link in (f"]({name}", f"](../{name}"):
            text = text.replace(link, f"]({folder}{name.lower()}")
    return text


def _read(app: Sphinx, page: str, source: list[str]) -> None:
    if not page.startswith("_root/"):
        source[0] = _linked(source[0], "_root/")


def _mark_code(
    app: Sphinx, what: str, name: str, documented: object, options: object, lines: list[str]
) -> None:
    """A paragraph of a docstring that is indented by four is code."""
    found: list[str] = []
    is_code = False
    for before, line in zip(["", *lines], lines, strict=False):
        if line.startswith("    ") and not before.strip() and not is_code:
            is_code = True
            found += ["::", ""]
        is_code = is_code and (line.startswith("    ") or not line.strip())
        found.append(line)
    lines[:] = found


def setup(app: Sphinx) -> None:
    """Connects what stands above."""
    _copy_root_pages()
    app.add_lexer("mermaid", TextLexer)
    app.connect("source-read", _read)
    app.connect("autodoc-process-docstring", _mark_code)
