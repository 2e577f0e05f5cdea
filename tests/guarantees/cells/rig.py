"""A rig of several cells: a Redis each beside the stack's, and one S3."""

from pathlib import Path
from string import ascii_lowercase
from typing import Any

from blipq import Client
from blipq.ledger.cells.operator import operator_of
from blipq.local.supervisor import Service
from guarantees.cells.fleet import Fleet
from guarantees.cells.servers import Server
from guarantees.rig import Rig


class CellsRig(Rig):
    """A rig whose client and workers know cells; each worker serves the one that it is given."""

    def __init__(self, folder: Path, cells: int, **options: Any) -> None:
        super().__init__(folder, **options)
        fields = self.stack.settings_fields()
        s3 = {name: text for name, text in fields.items() if name.startswith("s3_")}
        self.fleet = Fleet(folder / "cells", ascii_lowercase[:cells], timeout_s=3, **s3)
        self.client.close()
        self.settings = self.fleet.settings()
        self.client = Client(self.settings)
        self.operator = operator_of(self.client.ledger)

    @property
    def servers(self) -> list[Server]:
        """The cells' Redis servers."""
        return [*self.fleet.servers.values()]

    def launch_worker_in(self, cell: str, **options: Any) -> Service:
        """Starts a worker of a cell without waiting."""
        own = self.fleet.servers[cell].settings.redis_url
        return self.launch_worker(cells=self.fleet.cells, cell=cell, redis_url=own, **options)

    def close(self) -> None:
        """Ends all that runs."""
        for server in self.servers:
            server.thaw()
        super().close()
        self.fleet.stop()
