"""The folder is the diagram: who may import whom, and what must stay light."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from conftest import ROOT

PRODUCER, WORKER = ROOT / "producer" / "blipq", ROOT / "worker" / "blipq_worker"
HEAVY = (
    *("torch", "transformers", "bitsandbytes", "accelerate"),
    *("PIL", "numpy", "lancedb", "pyarrow"),
)
LATE = ("celery", "kombu", "boto3", "botocore")

#: Each module may import those of earlier rows and of its own.
ROWS = (
    ("settings", "gate", "batcher", "index"),
    ("structure", "s3_access"),
    ("https", "images", "blip2"),
    ("fetch",),
    ("engine", "index_writer"),
    ("leases", "ask", "ask_index"),
    ("kinds", "search", "pictures", "equal", "outputs"),
    ("tasks",),
    ("app",),
)
RANK = {module: rank for rank, row in enumerate(ROWS) for module in row}


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


def test_celery_and_boto3_are_loaded_when_they_are_used() -> None:
    statement = "import blipq; blipq.Client(redis_url='redis://127.0.0.1:1').close()"
    loaded = python(f"{statement}\nimport sys; print(*sys.modules)").split()
    assert set(loaded).isdisjoint(LATE)


def test_the_producer_works_where_the_workers_dependencies_are_missing() -> None:
    missing = f"import sys; sys.modules.update(dict.fromkeys({HEAVY!r}))"
    assert python(f"{missing}\nimport blipq.cli, blipq.local.up, blipq.s3.storage; print('fine')")


@pytest.mark.parametrize("path", sorted(PRODUCER.rglob("*.py")), ids=lambda path: path.stem)
def test_the_producer_knows_no_worker_and_no_model(path: Path) -> None:
    assert top_levels(path).isdisjoint({"blipq_worker", *HEAVY})


@pytest.mark.parametrize("module", RANK)
def test_the_workers_low_modules_know_no_high_ones(module: str) -> None:
    package = WORKER / module
    files = package.rglob("*.py") if package.is_dir() else [package.with_suffix(".py")]
    for path in files:
        used = {name.split(".")[1] for name in imports(path) if name.startswith("blipq_worker.")}
        used = {name for name in used if RANK.get(name, -1) > RANK[module]}
        assert not used, f"{path.name} imports {used}"


def test_the_batcher_knows_no_queue_and_no_model() -> None:
    names = {name.partition(".")[0] for name in imports(WORKER / "batcher.py")}
    assert names <= set(sys.stdlib_module_names)


def test_one_file_alone_knows_both_celery_and_blip2() -> None:
    both = {
        own_module(path)
        for path in WORKER.rglob("*.py")
        if "celery" in top_levels(path) and any("blip2" in name for name in imports(path))
    }
    assert both == {"app"}


def test_celery_is_known_to_few() -> None:
    producers = {path.name for path in PRODUCER.rglob("*.py") if "celery" in top_levels(path)}
    workers = {own_module(path) for path in WORKER.rglob("*.py") if "celery" in top_levels(path)}
    assert (producers, workers) == ({"broker.py"}, {"app", "consumer", "controls", "revoking"})


def test_a_service_may_have_its_own_producer_and_worker(tmp_path: Path) -> None:
    for name in ("producer", "worker", "contract", "settings"):
        (tmp_path / f"{name}.py").write_text(f"NAME = {name!r}")
    code = "import blipq, producer, worker, settings; print(producer.NAME, worker.NAME)"
    assert python(code, tmp_path) == "producer worker\n"
