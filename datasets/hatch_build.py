"""Adds to what datasets need the ``blipq`` of their own version: they use more than the API."""

from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface


class Requirements(MetadataHookInterface):
    """What ``[tool.hatch.metadata.hooks.custom]`` lists, and ``blipq``."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Sets ``dependencies``."""
        blipq = f"blipq=={metadata['version']}"
        metadata["dependencies"] = [blipq, *self.config["dependencies"]]
