"""Names in Redis and in the broker: one module spells them, and Lua gets them from there."""

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import blipq
import blipq_api
import blipq_worker
from blipq import Kind, Priority
from blipq.ledger import keys
from conftest import ROOT

PACKAGES = [Path(str(package.__file__)).parent for package in (blipq, blipq_api, blipq_worker)]
OWNER = PACKAGES[0] / "ledger" / "keys.py"
SCRIPTS = sorted((PACKAGES[0] / "ledger" / "scripts").glob("*.lua"))

#: A key or a channel, or a part in front of one; or a queue's or task's name that is put together.
SPELLED = re.compile(r"blipq:[a-z*{]|^blipq\.$|blipq(\\|%)?\.\(")

models = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,20}", fullmatch=True)


def texts(path: Path) -> Iterator[str]:
    """Every text in a module that is not a docstring: whole ones, and the parts of f-strings."""
    tree = ast.parse(path.read_text())
    alone = {node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and node not in alone and isinstance(node.value, str):
            yield node.value


def test_one_module_alone_spells_keys_channels_and_queues() -> None:
    modules = [path for package in PACKAGES for path in package.rglob("*.py")]
    spelling = [path for path in modules if any(map(SPELLED.search, texts(path)))]
    assert spelling == [OWNER]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_no_script_spells_a_key(script: Path) -> None:
    assert not re.search(r"blipq[:.%]", script.read_text())


def test_every_key_that_scripts_make_has_its_name_from_the_header() -> None:
    used = set(re.findall(r"\b[a-z]+_key\(", "".join(path.read_text() for path in SCRIPTS)))
    made = set(re.findall(r"local function ([a-z]+_key\()", keys.lua_header()))
    assert used == made


def test_every_constant_of_the_header_is_used_by_a_script() -> None:
    scripts = "".join(path.read_text() for path in SCRIPTS)
    for name in re.findall(r"local ([A-Z_]+) =", keys.lua_header()):
        assert re.search(rf"\b{name}\b", scripts), name


def made() -> Iterator[str]:
    """Every key and channel, without the name that is put behind it."""
    for value in vars(keys).values():
        if inspect.isfunction(value) and len(inspect.signature(value).parameters) == 1:
            value = value("")
        if isinstance(value, str) and value.startswith("blipq:"):
            yield value


def test_every_key_and_channel_is_documented() -> None:
    pages = "".join(page.read_text() for page in (ROOT / "docs").rglob("*.md"))
    assert [key for key in made() if f"`{key}" not in pages] == []
    assert len(list(made())) > 25


def test_each_model_and_priority_has_a_queue() -> None:
    assert keys.queue_name("opt-2.7b", Priority.HIGH) == "blipq.opt-2.7b.high"
    assert keys.task_name(Kind.VQA) == "blipq.vqa"


@given(models, st.sampled_from(Priority))
def test_a_queue_names_its_model(model: str, priority: Priority) -> None:
    queue = keys.queue_name(model, priority)
    assert keys.model_of(queue) == model
    assert keys.broker_key(queue) == keys.BrokerKey(model, is_binding=False)
    assert keys.broker_key(f"{queue}\x06\x163") == keys.BrokerKey(model, is_binding=False)
    assert keys.broker_key(f"_kombu.binding.{queue}") == keys.BrokerKey(model, is_binding=True)


@pytest.mark.parametrize("key", ["blipq:job:job_1", "celery", "blipq.default", "x.blipq.m.low"])
def test_other_keys_of_a_broker_are_not_ours(key: str) -> None:
    assert keys.broker_key(key) is None
