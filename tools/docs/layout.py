"""Writes the layout of the code into CONTRIBUTING.md and docs/architecture.md, as checked in CI.

Layers and forbidden imports come from the import contracts in pyproject.toml, and what lives in a
folder or file from its docstring: ``python -m tools.docs.layout``.
"""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tools.docs import DOCS, with_section, write_or_check

ROOT = DOCS.parent
PAGES = (ROOT / "CONTRIBUTING.md", DOCS / "architecture.md")
FOLDERS = {"blipq": "producer", "blipq_api": "api", "blipq_worker": "worker"}
FOLDERS |= {"blipq_datasets": "datasets"}


def contracts(kind: str) -> list[dict[str, Any]]:
    """The import contracts of a type."""
    linter = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    return [each for each in linter["contracts"] if each["type"] == kind]


def layers_of(contract: dict[str, Any]) -> list[list[str]]:
    """Names of folders and files in each layer, the highest layer first."""
    return [re.split(r"\s*[|:]\s*", layer) for layer in contract["layers"]]


def path_of(module: str) -> Path:
    """The folder or file of a module."""
    path = ROOT / FOLDERS[module.partition(".")[0]] / module.replace(".", "/")
    return path if path.is_dir() else path.with_suffix(".py")


def purpose_of(path: Path) -> str:
    """The first paragraph of a folder's or file's docstring, on one line."""
    source = path / "__init__.py" if path.is_dir() else path
    text = ast.get_docstring(ast.parse(source.read_text())) or ""
    return " ".join(text.partition("\n\n")[0].split()).replace("``", "`")


def tree() -> Iterator[str]:
    """A table of each container, then the imports that are forbidden beside the layers."""
    for contract in contracts("layers"):
        (container,) = contract["containers"]
        folder = path_of(container)
        yield f"### `{folder.relative_to(ROOT)}/`"
        yield f"\n{purpose_of(folder)}\n"
        yield "| layer | folder or file | what lives there |"
        yield "|---|---|---|"
        layers = layers_of(contract)
        for height, names in zip(range(len(layers), 0, -1), layers, strict=True):
            for name in names:
                path = path_of(f"{container}.{name}")
                shown = f"{name}/" if path.is_dir() else path.name
                yield f"| {height} | `{shown}` | {purpose_of(path)} |"
        yield ""
    yield "Some imports are forbidden whatever the layer:\n"
    yield from forbidden()


def forbidden() -> Iterator[str]:
    """What may import what not, a line for each contract."""
    for contract in contracts("forbidden"):
        sources = ", ".join(f"`{each}`" for each in contract["source_modules"])
        targets = ", ".join(f"`{each}`" for each in contract["forbidden_modules"])
        how = "directly" if contract.get("allow_indirect_imports") else "directly or indirectly"
        yield f"- {contract['name']}: {sources} may not import {targets}, {how}."
        for exception in contract.get("ignore_imports", []):
            importer, _, imported = exception.partition(" -> ")
            yield f"  Exception: `{importer.removesuffix('.*')}` imports `{imported}`."


def diagram() -> Iterator[str]:
    """The layers as a Mermaid flowchart."""
    yield "```mermaid"
    yield "flowchart TD"
    nodes = {}
    for number, contract in enumerate(contracts("layers")):
        (container,) = contract["containers"]
        nodes.setdefault(container, f"p{number}")
        yield f'  subgraph p{number}["{container}"]'
        layers = layers_of(contract)
        for height, names in enumerate(layers):
            yield f'    n{number}_{height}["{" · ".join(names)}"]'
            nodes |= {f"{container}.{name}": f"n{number}_{height}" for name in names}
        yield "    " + " --> ".join(f"n{number}_{height}" for height in range(len(layers)))
        yield "  end"
        if nodes[container] != f"p{number}":
            yield f"  {nodes[container]} -. in detail .-> p{number}"
    for program in ("blipq_api", "blipq_worker", "blipq_datasets"):
        yield f"  {nodes[program]} --> {nodes['blipq']}"
    yield "```"


def main() -> int:
    """Writes the sections or, with ``--check``, prints which are stale."""
    contributing, architecture = PAGES
    pages = {
        contributing: with_section(contributing.read_text(), "layout", "\n".join(tree())),
        architecture: with_section(architecture.read_text(), "layers", "\n".join(diagram())),
    }
    return write_or_check(pages, "tools.docs.layout")


if __name__ == "__main__":
    sys.exit(main())
