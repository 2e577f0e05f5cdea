"""Commands that submit a job, or look one up."""

import json
from typing import Annotated, Any

import typer

from blipq.cli.output import IdArgument, JsonOption, connected, follow, out, print_json, status_line
from blipq.contract import Priority

ImageArgument = Annotated[str, typer.Argument(help="s3://bucket/key, or a local file to upload.")]
ModelOption = Annotated[str, typer.Option(help="Served model.")]
PriorityOption = Annotated[Priority, typer.Option(help="Served round robin.")]
ExpiresOption = Annotated[str | None, typer.Option(help="Deadline, such as 90s, 10m or 2d.")]
KeyOption = Annotated[str | None, typer.Option(help="The same key gives the same job.")]
OutputOption = Annotated[str | None, typer.Option(help="s3:// object to write the result to.")]
TimeoutOption = Annotated[float, typer.Option(help="Longest wait for the result, in seconds.")]
WaitOption = Annotated[bool, typer.Option("--wait/--no-wait", help="Print the id and leave.")]
GenerationOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="Generation parameter, e.g. num_beams=1."),
]


def caption(
    image: ImageArgument,
    prompt: Annotated[str | None, typer.Option(help="Text the caption goes on from.")] = None,
    best_of: Annotated[int | None, typer.Option(help="Rank this many captions.")] = None,
    generation: GenerationOption = None,
    model: ModelOption = "default",
    priority: PriorityOption = Priority.NORMAL,
    expires_in: ExpiresOption = None,
    idempotency_key: KeyOption = None,
    output: OutputOption = None,
    timeout: TimeoutOption = 60.0,
    wait: WaitOption = True,
    as_json: JsonOption = False,
) -> None:
    """Describe an image: blipq caption photo.jpg"""
    with connected(as_json) as client:
        job = client.caption(
            image,
            prompt,
            best_of=best_of,
            generation=_parameters(generation),
            model=model,
            priority=priority,
            expires_in=expires_in,
            idempotency_key=idempotency_key,
            output=output,
        )
        follow(job, wait, timeout, as_json)


def vqa(
    image: ImageArgument,
    questions: Annotated[list[str], typer.Argument(help="One or more questions.")],
    generation: GenerationOption = None,
    model: ModelOption = "default",
    priority: PriorityOption = Priority.NORMAL,
    expires_in: ExpiresOption = None,
    idempotency_key: KeyOption = None,
    output: OutputOption = None,
    timeout: TimeoutOption = 60.0,
    wait: WaitOption = True,
    as_json: JsonOption = False,
) -> None:
    """Ask about an image: blipq vqa photo.jpg "how many dogs are there?"."""
    with connected(as_json) as client:
        job = client.vqa(
            image,
            questions,
            generation=_parameters(generation),
            model=model,
            priority=priority,
            expires_in=expires_in,
            idempotency_key=idempotency_key,
            output=output,
        )
        follow(job, wait, timeout, as_json)


def match(
    image: ImageArgument,
    texts: Annotated[list[str], typer.Argument(help="One or more texts.")],
    head: Annotated[str, typer.Option(help="itm: a probability; itc: a cosine.")] = "itm",
    model: ModelOption = "default",
    priority: PriorityOption = Priority.NORMAL,
    expires_in: ExpiresOption = None,
    idempotency_key: KeyOption = None,
    output: OutputOption = None,
    timeout: TimeoutOption = 60.0,
    wait: WaitOption = True,
    as_json: JsonOption = False,
) -> None:
    """Score texts against an image: blipq match photo.jpg "a cat" "a dog"."""
    with connected(as_json) as client:
        job = client.match(
            image,
            texts,
            head=head,  # type: ignore[arg-type]  # pydantic checks it and names the choices
            model=model,
            priority=priority,
            expires_in=expires_in,
            idempotency_key=idempotency_key,
            output=output,
        )
        follow(job, wait, timeout, as_json)


def status(id: IdArgument, as_json: JsonOption = False) -> None:
    """Show where a job is, and when no live worker serves its model."""
    with connected(as_json) as client:
        info = client.job(id).info()
        if as_json:
            print_json(info)
        else:
            out.print(status_line(info), markup=False)


def result(id: IdArgument, timeout: TimeoutOption = 60.0, as_json: JsonOption = False) -> None:
    """Wait for a job and print its result."""
    with connected(as_json) as client:
        follow(client.job(id), True, timeout, as_json)


def cancel(id: IdArgument, as_json: JsonOption = False) -> None:
    """Cancel a job, wherever it is."""
    with connected(as_json) as client:
        job = client.job(id)
        cancelled = job.cancel()
        if as_json:
            print(json.dumps({"id": id, "cancelled": cancelled, "status": job.status}))
        else:
            out.print("cancelled" if cancelled else f"it had ended: {job.status}")


def _parameters(pairs: list[str] | None) -> dict[str, Any] | None:
    if not pairs:
        return None
    split = [pair.partition("=") for pair in pairs]
    return {name.strip(): value.strip() for name, _, value in split}
