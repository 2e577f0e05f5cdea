"""The folder is the diagram: who may import whom, and what must stay light."""

import ast
import itertools
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from tools.docs import counts

from conftest import ROOT

PRODUCER, WORKER = ROOT / "producer" / "blipq", ROOT / "worker" / "blipq_worker"
DOOR = ROOT / "api" / "blipq_api"
DATASETS = ROOT / "datasets" / "blipq_datasets"
HEAVY = (
    *("torch", "transformers", "bitsandbytes", "accelerate"),
    *("PIL", "numpy", "lancedb", "pyarrow"),
)
LATE = ("celery", "kombu", "boto3", "botocore")

#: Modules in one folder, its ``__init__`` among them.
MOST_MODULES = 15
#: Lines of one function, its signature and docstring among them.
LONGEST_FUNCTION = 72


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def top_levels(path: Path) -> set[str]:
    return {name.partition(".")[0] for name in imports(path)}


def own_module(path: Path) -> str:
    """The worker's module or package that a file belongs to."""
    return path.relative_to(WORKER).parts[0].removesuffix(".py")


def python(code: str, folder: Path | None = None) -> str:
    environment = {**os.environ, "PYTHONPATH": ""}
    ran = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=folder,
        env=environment,
        timeout=60,
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


@pytest.mark.parametrize(
    "statement",
    [
        "import blipq",
        "import blipq; blipq.Client(redis_url='redis://127.0.0.1:1').close()",
        "import blipq.cli",
        "import blipq.local.stack",
    ],
)
def test_a_producer_loads_nothing_heavy(statement: str) -> None:
    loaded = python(f"{statement}\nimport sys; print(*sys.modules)").split()
    assert set(loaded).isdisjoint(HEAVY)


def test_a_web_server_is_loaded_for_the_door_alone_and_the_door_loads_no_model() -> None:
    show = "import sys; print(*sys.modules)"
    web = {"starlette", "uvicorn", "httptools", "anyio"}
    assert set(python(f"import blipq.cli, blipq_api.cli; {show}").split()).isdisjoint(web)
    loaded = python(f"import blipq_api.server; {show}").split()
    assert set(loaded).isdisjoint(HEAVY)
    assert web <= set(loaded)


def test_celery_and_boto3_are_loaded_when_they_are_used() -> None:
    statement = "import blipq; blipq.Client(redis_url='redis://127.0.0.1:1').close()"
    loaded = python(f"{statement}\nimport sys; print(*sys.modules)").split()
    assert set(loaded).isdisjoint(LATE)


def test_the_producer_works_where_the_workers_dependencies_are_missing() -> None:
    missing = f"import sys; sys.modules.update(dict.fromkeys({HEAVY!r}))"
    assert python(f"{missing}\nimport blipq.cli, blipq.local.up, blipq.s3.storage; print('fine')")


def test_layers_and_other_import_contracts_hold_for_every_module() -> None:
    """They stand in pyproject.toml; a new folder must be given its place there."""
    code = "from importlinter.cli import lint_imports_command as run; run()"
    command = [sys.executable, "-c", code]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert ran.returncode == 0, ran.stdout + ran.stderr


@pytest.mark.parametrize("part", ["kinds", "jobs", "images", "inference"])
def test_what_runs_before_the_model_loads_no_torch(part: str) -> None:
    code = f"""
import sys, importlib, pkgutil
import blipq_worker.{part} as part
for module in pkgutil.walk_packages(part.__path__, part.__name__ + "."):
    importlib.import_module(module.name)
print(*sys.modules)
"""
    loaded = python(code).split()
    assert f"blipq_worker.{part}" in loaded
    assert set(loaded).isdisjoint({"torch", "transformers", "blipq_worker.blip2"})


@pytest.mark.parametrize(
    "root", [PRODUCER, DOOR, WORKER, DATASETS, ROOT / "tests"], ids=lambda root: root.name
)
def test_a_folder_can_be_taken_in_at_a_glance(root: Path) -> None:
    counts = Counter(path.parent.relative_to(root) for path in root.rglob("*.py"))
    assert {str(folder): count for folder, count in counts.items() if count > MOST_MODULES} == {}


def test_a_function_can_be_read_at_a_glance() -> None:
    lines, name = counts.longest_function(counts.PACKAGES.values())
    assert lines <= LONGEST_FUNCTION, name


def test_the_counts_of_the_code_are_printed_and_find_no_circle(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert counts.main() == 0
    printed = capsys.readouterr().out
    modules = sum(1 for root in (PRODUCER, DOOR, WORKER, DATASETS) for _ in root.rglob("*.py"))
    assert f" {modules} modules" in printed
    assert "folders with a circle: 0" in printed


def test_counts_show_a_circle_that_only_a_type_checker_would_run_through(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    house = tmp_path / "house"
    files = {
        "__init__": "",
        "hall": "from house.kitchen import stove",
        "kitchen/__init__": "",
        "kitchen/stove": "import house.cellar",
        "cellar": """
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    import house.hall
def dig():
    deep = 1
    return deep
""",
    }
    for name, text in files.items():
        (house / name).parent.mkdir(exist_ok=True)
        (house / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(counts, "PACKAGES", {"house": house})
    assert counts.main() == 1
    whole, kitchen = counts.folders({"house": house})
    assert (whole.modules, whole.parts, whole.arrows) == (3, 3, 3)
    assert (kitchen.modules, kitchen.parts, kitchen.arrows, kitchen.circle) == (2, 1, 0, ())
    after = dict(itertools.pairwise(whole.circle))
    assert after == {
        "house.hall": "house.kitchen",
        "house.kitchen": "house.cellar",
        "house.cellar": "house.hall",
    }
    printed = capsys.readouterr().out
    assert " > ".join(whole.circle) in printed
    assert "longest function: 3 lines, dig in house/cellar.py" in printed


def test_the_batcher_knows_no_queue_and_no_model() -> None:
    folder = WORKER / "batching"
    names = {name for path in folder.glob("*.py") for name in imports(path)}
    others = {name for name in names if not name.startswith("blipq_worker.batching")}
    assert {name.partition(".")[0] for name in others} <= set(sys.stdlib_module_names)


def test_no_file_knows_both_celery_and_blip2() -> None:
    both = {
        own_module(path)
        for path in WORKER.rglob("*.py")
        if "celery" in top_levels(path) and any("blip2" in name for name in imports(path))
    }
    assert both == set()


def test_celery_is_known_to_few() -> None:
    producers = {path.name for path in PRODUCER.rglob("*.py") if "celery" in top_levels(path)}
    workers = {own_module(path) for path in WORKER.rglob("*.py") if "celery" in top_levels(path)}
    assert (producers, workers) == ({"broker.py"}, {"taking", "messages"})


def test_a_service_may_have_its_own_producer_and_worker(tmp_path: Path) -> None:
    for name in ("producer", "worker", "contract", "settings"):
        (tmp_path / f"{name}.py").write_text(f"NAME = {name!r}")
    code = "import blipq, producer, worker, settings; print(producer.NAME, worker.NAME)"
    assert python(code, tmp_path) == "producer worker\n"
