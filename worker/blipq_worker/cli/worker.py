"""``blipq worker``."""

from typing import Annotated

import typer

from blipq.cli.terminal.output import reported
from blipq_worker.process import fleet


def worker(
    gpus: Annotated[
        str | None,
        typer.Option(help="One worker per GPU: 'all', or indexes and UUIDs such as 0,MIG-..."),
    ] = None,
    processes: Annotated[
        int,
        typer.Option(
            min=1, help="Workers with a model each: for each of --gpus, or sharing the cores."
        ),
    ] = 1,
) -> None:
    """Run a worker for the services that the settings name.

    SIGTERM drains it. On a GPU a worker is several processes: one runs the model, and BLIPQ_FRONTS
    others take jobs, fetch and decode. On a CPU it is one, and several workers with few cores each
    may do more than one with all of them.

    Examples:
        blipq worker
        BLIPQ_MODELS=default=opt-2.7b blipq worker --gpus all
        blipq worker --processes 4
    """
    with reported():
        if gpus is None and processes == 1:
            fleet.run_one()
        else:
            raise typer.Exit(fleet.run_many(gpus, processes))
