"""Commands for jobs that are out of attempts."""

from typing import Annotated

import typer

from blipq.cli.terminal.group import Group
from blipq.cli.terminal.output import (
    IdArgument,
    JsonOption,
    act_on_each,
    connected,
    out,
    print_jobs,
)
from blipq.ledger.cells.operator import operator_of

app = Group("Jobs that are out of attempts.")


@app.command("list")
def list_(
    limit: Annotated[int, typer.Option(help="At most this many, newest first.")] = 100,
    as_json: JsonOption = False,
) -> None:
    """List the dead letters.

    Examples:
        blipq dead-letters list --limit 20
    """
    with connected(as_json) as client:
        operator = operator_of(client.ledger)
        print_jobs(operator.dead_letters(limit), as_json, "no dead letters")


@app.command("show")
def show(id: IdArgument) -> None:
    """Show one dead letter, as JSON.

    Examples:
        blipq dead-letters show job_0197f2a0-5c7e-7d3b-9a51-3c1d6e0f4a2b
    """
    with connected(as_json=True) as client:
        print(client.job(id).info().model_dump_json(indent=2, exclude_none=True))


@app.command("retry")
def retry(
    ids: Annotated[list[str], typer.Argument(metavar="ID...", help="The jobs' ids.")],
) -> None:
    """Queue dead letters again, with fresh attempts; they run alone.

    Examples:
        blipq dead-letters retry job_0197f2a0-5c7e-7d3b-9a51-3c1d6e0f4a2b
    """
    with connected() as client:
        operator = operator_of(client.ledger)

        def again(id: str) -> bool:
            message = operator.retry_dead_letter(id)
            if message is not None:
                client.broker.publish(message)
                out.print(f"{id}: queued", markup=False)
            return message is not None

        act_on_each(ids, again, "no dead letter {}")


@app.command("drop")
def drop(
    ids: Annotated[list[str], typer.Argument(metavar="ID...", help="The jobs' ids.")],
) -> None:
    """Forget dead letters and their jobs.

    Examples:
        blipq dead-letters drop job_0197f2a0-5c7e-7d3b-9a51-3c1d6e0f4a2b
    """
    with connected() as client:
        operator = operator_of(client.ledger)

        def drop_one(id: str) -> bool:
            dropped = operator.drop_dead_letter(id)
            if dropped:
                out.print(f"{id}: dropped", markup=False)
            return dropped

        act_on_each(ids, drop_one, "no dead letter {}")
