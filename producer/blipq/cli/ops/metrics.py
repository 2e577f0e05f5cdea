"""The exporter of what the ledger holds."""

import signal
import threading
from contextlib import ExitStack
from functools import partial
from typing import Annotated

import typer

from blipq.cli.terminal.output import errors, reported
from blipq.exporter import ANYWHERE, served
from blipq.settings import Settings
from blipq.submission import checked


def metrics(
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port of /metrics.")] = 9464,
    host: Annotated[
        str, typer.Option(help="Address that this port is open at, such as 127.0.0.1.")
    ] = ANYWHERE,
    deletion_costs: Annotated[
        str | None,
        typer.Option(
            metavar="SELECTOR",
            help="In Kubernetes: labels of the workers' pods, whose deletion costs are written.",
        ),
    ] = None,
) -> None:
    """Serve Prometheus metrics of the queues until SIGTERM.

    Depth, age, workers, dead letters and predicted work. /work/MODEL has that as JSON for an
    autoscaler: waiting_s, running_s and total_s of GPU time. One exporter is enough: workers and
    senders have metrics of their own work alone.

    Examples:
        blipq metrics --port 9464
    """
    from prometheus_client import CollectorRegistry

    from blipq.ledger.connection import connect
    from blipq.ops.deletion_costs import PAUSE_S, DeletionCosts, Pods
    from blipq.ops.metrics import CellsCollector, LedgerCollector
    from blipq.ops.outlook import work_page

    stop = threading.Event()
    with reported():
        settings = checked(Settings)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: stop.set())
        registry = CollectorRegistry()
        with ExitStack() as stack:
            each = settings.by_cell.items()
            clients = {name: stack.enter_context(connect(own)) for name, own in each}
            collectors = {name: LedgerCollector(client) for name, client in clients.items()}
            pages = {"work": partial(work_page, clients.values())}
            bound = stack.enter_context(served(registry, port, host, pages))
            pods = Pods(deletion_costs) if deletion_costs else None
            registry.register(CellsCollector(collectors) if settings.is_fleet else collectors[""])
            errors.print(f"metrics of {settings.endpoints} on port {bound}", markup=False)
            while not stop.wait(PAUSE_S):
                for client in clients.values():
                    if pods is not None:
                        DeletionCosts(client, pods).tick()
