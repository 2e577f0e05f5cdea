"""How a script is put together: with what it uses of the shared definitions, and no more."""

import re
from collections.abc import Iterator
from importlib import resources
from importlib.resources.abc import Traversable

import pytest

from blipq.ledger.scripts.runner import script_text

FOLDER = resources.files("blipq.ledger") / "scripts"
SOURCES = sorted(
    (each for each in FOLDER.iterdir() if each.name.endswith(".lua")), key=lambda each: each.name
)
SHARED = ("common.lua", "outbox.lua", "noted.lua")
RARELY = "--RARELY "


def rare_blocks(source: str) -> Iterator[tuple[list[str], str]]:
    """The names of each rare block, and what the text is without the block."""
    lines = source.splitlines()
    for first, line in enumerate(lines):
        if line.strip().startswith(RARELY):
            indent = len(line) - len(line.lstrip())
            last = next(
                at
                for at in range(first, len(lines))
                if lines[at] and len(lines[at]) - len(lines[at].lstrip()) < indent
            )
            names = line.strip().removeprefix(RARELY).split()
            yield names, "\n".join(lines[:first] + lines[last:])


@pytest.mark.parametrize("source", SOURCES, ids=lambda each: each.name)
def test_what_a_rare_block_defines_is_used_nowhere_else_in_its_text(source: Traversable) -> None:
    whole = source.read_text()
    definitions = re.split(r"(?m)^(?=local )", whole)
    for text in definitions if source.name in SHARED else [whole]:
        for names, rest in rare_blocks(text):
            code = re.sub(r"--.*", "", rest)
            assert [name for name in names if re.search(rf"\b{name}\b", code)] == []


def test_a_claim_that_meets_no_webhook_and_no_deadline_defines_neither_events_nor_ends() -> None:
    text = script_text("claim")
    block = text.index("if tonumber(job.deadline) <= now then")
    assert text.index("local function end_job(") > block
    assert text.index("local function post_event(") > block
    assert text.count("local function end_job(") == 1


def test_a_definition_above_a_rare_block_is_not_repeated_in_it() -> None:
    text = script_text("claim")
    assert text.count("local function tally(") == 1
    assert text.index("local function tally(") < text.index("local function end_job(")


def test_the_names_of_keys_are_written_out() -> None:
    for source in SOURCES:
        if source.name not in SHARED:
            text = script_text("outbox", source.name.removesuffix(".lua"))
            assert not re.search(r"\w_key\(", text), source.name
            assert RARELY not in text
