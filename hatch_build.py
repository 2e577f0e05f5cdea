"""The root of a clone installs the code of all distributions as ``blipq``.

What they need stands in their own files: ``pyproject.toml`` in producer/, api/, worker/ and
datasets/. The extras ``api``, ``worker`` and ``datasets`` list it, and never name a distribution of
ours: they are on no package index.
"""

import tomllib
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

FOLDERS = ("producer", "api", "worker", "datasets")


class Workspace(MetadataHookInterface):
    """Requirements, extras and entry points of all of them."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Sets the fields that the root's ``pyproject.toml`` calls dynamic."""
        producer, api, worker, datasets = map(self._read, FOLDERS)
        client = producer["project"]
        extras = {**client["optional-dependencies"], **worker["project"]["optional-dependencies"]}
        added = {
            "api": _needed(api),
            "worker": [*extras["search"], *_needed(worker)],
            "datasets": _needed(datasets),
        }
        metadata["dependencies"] = client["dependencies"]
        metadata["optional-dependencies"] = {**extras, **added}
        metadata["scripts"] = client["scripts"]
        metadata["entry-points"] = {
            "blipq.commands": {**_commands(api), **_commands(worker)},
            **datasets["project"]["entry-points"],
        }

    def _read(self, folder: str) -> dict[str, Any]:
        return tomllib.loads((Path(self.root) / folder / "pyproject.toml").read_text("utf-8"))


def _needed(distribution: dict[str, Any]) -> list[str]:
    found: list[str] = distribution["tool"]["hatch"]["metadata"]["hooks"]["custom"]["dependencies"]
    return found


def _commands(distribution: dict[str, Any]) -> dict[str, str]:
    found: dict[str, str] = distribution["project"]["entry-points"]["blipq.commands"]
    return found
