"""The root of a clone installs the code of both distributions as ``blipq``.

What they need stands in their own files, producer/pyproject.toml and worker/pyproject.toml. The
extra ``worker`` lists it, and never names ``blipq-worker``, which is on no package index.
"""

import tomllib
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface


class Workspace(MetadataHookInterface):
    """Requirements, extras and entry points of both."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Sets the fields that the root's ``pyproject.toml`` calls dynamic."""
        producer, worker = (self._read(name) for name in ("producer", "worker"))
        client = producer["project"]
        extras = client["optional-dependencies"]
        needed = worker["tool"]["hatch"]["metadata"]["hooks"]["custom"]["dependencies"]
        metadata["dependencies"] = client["dependencies"]
        metadata["optional-dependencies"] = {**extras, "worker": [*extras["search"], *needed]}
        metadata["scripts"] = client["scripts"]
        metadata["entry-points"] = worker["project"]["entry-points"]

    def _read(self, folder: str) -> dict[str, Any]:
        return tomllib.loads((Path(self.root) / folder / "pyproject.toml").read_text("utf-8"))
