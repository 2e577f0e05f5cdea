"""Prints how large the code's folders are and how their parts import each other.

``python -m tools.docs.counts``; exits 1 if the parts of a folder import each other in a circle.
"""

import ast
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from itertools import permutations
from pathlib import Path

import grimp
from tools.docs import DOCS

ROOT = DOCS.parent
PACKAGES = {
    "blipq": ROOT / "producer/blipq",
    "blipq_api": ROOT / "api/blipq_api",
    "blipq_datasets": ROOT / "datasets/blipq_datasets",
    "blipq_worker": ROOT / "worker/blipq_worker",
}


@dataclass(frozen=True)
class Folder:
    """A package.

    modules: its files, ``__init__`` among them, without those of its subfolders. parts: how many
    files and subfolders the folder has beside its ``__init__``. arrows: pairs of parts of which one
    imports the other, also where only a type checker does. circle: parts that import each other in
    turn, the first again at the end; empty if there are none.
    """

    name: str
    modules: int
    parts: int
    arrows: int
    circle: tuple[str, ...]


def folders(packages: Mapping[str, Path]) -> Iterator[Folder]:
    """All folders of packages that can be imported, given with their paths, by name."""
    first, *others = packages
    graph = grimp.build_graph(first, *others, cache_dir=None)
    for package, root in packages.items():
        for path in sorted(each.parent for each in root.rglob("__init__.py")):
            name = ".".join((package, *path.relative_to(root).parts))
            parts = sorted(graph.find_children(name))
            arrows = [
                (importer, imported)
                for importer, imported in permutations(parts, 2)
                if graph.direct_import_exists(
                    importer=importer, imported=imported, as_packages=True
                )
            ]
            modules = len(list(path.glob("*.py")))
            yield Folder(name, modules, len(parts), len(arrows), _circle(arrows))


def _circle(arrows: Sequence[tuple[str, str]]) -> tuple[str, ...]:
    sorter: TopologicalSorter[str] = TopologicalSorter()
    for importer, imported in arrows:
        sorter.add(importer, imported)
    try:
        sorter.prepare()
    except CycleError as error:
        # The sorter lists each module before those that import it; here importers come first.
        return tuple(reversed(error.args[1]))
    return ()


def longest_module(roots: Iterable[Path]) -> tuple[int, str]:
    """Lines and path of the longest file below these folders."""
    return max((len(path.read_text().splitlines()), name) for name, path in _files(roots))


def longest_function(roots: Iterable[Path]) -> tuple[int, str]:
    """Lines and name of the longest function or method, signature and docstring included."""
    return max(
        ((node.end_lineno or node.lineno) - node.lineno + 1, f"{node.name} in {name}")
        for name, path in _files(roots)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    )


def _files(roots: Iterable[Path]) -> Iterator[tuple[str, Path]]:
    """Files below these folders, by their path from the folder's parent."""
    for root in roots:
        for path in root.rglob("*.py"):
            yield str(path.relative_to(root.parent)), path


def report(found: Sequence[Folder], roots: Iterable[Path]) -> Iterator[str]:
    """A line for each folder, then what is largest."""
    width = max(len(each.name) for each in found)
    yield f"{'folder':{width}}  modules  parts  arrows  circle"
    for each in found:
        circle = " > ".join(each.circle) or "none"
        yield f"{each.name:{width}}  {each.modules:7}  {each.parts:5}  {each.arrows:6}  {circle}"
    largest = max(found, key=lambda each: each.modules)
    yield f"{len(found)} folders, {sum(each.modules for each in found)} modules"
    yield f"folders with a circle: {sum(bool(each.circle) for each in found)}"
    yield f"largest folder: {largest.modules} modules, {largest.name}"
    yield "longest module: {} lines, {}".format(*longest_module(roots))
    yield "longest function: {} lines, {}".format(*longest_function(roots))


def main() -> int:
    """Prints the counts; the exit code."""
    found = list(folders(PACKAGES))
    print(*report(found, PACKAGES.values()), sep="\n")
    return 1 if any(each.circle for each in found) else 0


if __name__ == "__main__":
    sys.exit(main())
