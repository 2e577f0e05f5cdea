"""The console's files: those of other projects, and templates that let no text run."""

import hashlib
import json
import re
from importlib import resources

import pytest

from api.console.conftest import HX, TEMPLATES, Markup
from blipq.pages import environment
from blipq_api.console import pages

VENDORED = resources.files("blipq_api.console") / "vendored"


def test_files_of_other_projects_have_the_digests_that_are_named() -> None:
    lines = (VENDORED / "README.md").read_text().splitlines()
    rows = [
        [cell.strip(" `") for cell in line.split("|")[1:-1]] for line in lines if "dist/" in line
    ]
    named = {file: digest for file, _, _, digest in rows}
    found = {
        each.name: hashlib.sha256(each.read_bytes()).hexdigest()
        for each in VENDORED.iterdir()
        if each.name.endswith((".js", ".css"))
    }
    assert found == named
    for file, package, license, _ in rows:
        assert re.fullmatch(r"[\w.]+` \d+\.\d+\.\d+, `dist/", package), file
        kept = license.rpartition("`")[2]
        assert (VENDORED / kept).read_text()


def test_pages_use_the_files_of_other_projects_as_they_are() -> None:
    for name in ("htmx.min.js", "uPlot.iife.min.js", "uPlot.min.css"):
        assert pages.files()[name] == (VENDORED / name).read_bytes()


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_no_template_puts_a_text_where_it_could_run(name: str) -> None:
    text = TEMPLATES[name]
    for attribute, value in HX.findall(text):
        assert attribute.startswith("hx-"), f"{attribute}: no on* and no style"
        assert value[:1] in ('"', "'"), f"{attribute}={value}"
        assert not re.search(r"\{[{%]", value), f"{attribute}={value}"
    assert re.findall(r"(?:hx-|\son)[\w:-]*\{[{%]", text) == [], "no attribute has a computed name"
    assert re.findall(r"\s[\w:-]+\s*=\s*\{\{", text) == [], "every computed value is quoted"
    assert re.findall(r"\|\s*safe\b|\bautoescape\b", text) == []


def test_templates_are_looked_through_for_what_they_must_not_have() -> None:
    for wrong in ('<a hx-get="{{ id }}">', '<a data-hx-vals=\'{"a": "{{ id }}"}\'>', "<p style=a>"):
        ((attribute, value),) = HX.findall(wrong)
        assert not attribute.startswith("hx-") or "{{" in value


def test_every_page_escapes() -> None:
    assert pages._environment().autoescape is True
    assert environment("blipq_api.console").autoescape is True


def test_htmx_runs_no_text_and_asks_nobody_else() -> None:
    layout = Markup(TEMPLATES["layout.html"])
    (config,) = (
        json.loads(given["content"])
        for tag, given in layout.elements
        if tag == "meta" and given.get("name") == "htmx-config"
    )
    assert config["allowEval"] is False
    assert config["allowScriptTags"] is False
    assert config["selfRequestsOnly"] is True
    assert config["includeIndicatorStyles"] is False, "a style in the page would be refused"
    assert config["historyCacheSize"] == 0, "no page is kept in the browser's storage"
    assert config["timeout"] > 0
