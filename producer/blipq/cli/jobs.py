"""Commands that submit a job, or look one up."""

from typing import Annotated, Any, Unpack

import typer

from blipq.cli.terminal.options import TimeoutOption, pairs, verb
from blipq.cli.terminal.output import (
    IdArgument,
    JsonOption,
    connected,
    follow,
    out,
    print_json,
    status_line,
)
from blipq.cli.terminal.several import Several, named
from blipq.client.job import Job
from blipq.client.sync_client import Client
from blipq.contract import Generation, OptionFields
from blipq.errors import InvalidRequest
from blipq.submission import checked

ImageArgument = Annotated[
    str, typer.Argument(help="s3://bucket/key, https://..., or a local file to upload.")
]
ConfidenceOption = Annotated[
    float | None,
    typer.Option(help="Mark texts as uncertain whose tokens are less likely, from 0 to 1."),
]
GenerationOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="Generation parameter, e.g. num_beams=1."),
]


def _generation(texts: list[str] | None) -> dict[str, str] | None:
    """``--set``'s parameters. Raises InvalidRequest, which names the option."""
    given = pairs(texts, "--set")
    try:
        checked(Generation, **(given or {}))
    except InvalidRequest as error:
        raise InvalidRequest(f"--set {error}") from None
    return given


@verb
def caption(
    client: Client,
    images: Annotated[
        list[str],
        typer.Argument(
            help="s3://bucket/key, https://..., or local files to upload; - reads them from stdin."
        ),
    ],
    prompt: Annotated[str | None, typer.Option(help="Text the caption goes on from.")] = None,
    best_of: Annotated[int | None, typer.Option(help="Rank this many captions.")] = None,
    min_confidence: ConfidenceOption = None,
    generation: GenerationOption = None,
    **options: Unpack[OptionFields],
) -> Job[Any] | Several:
    """Describe an image, or several.

    Of several, each line of the answer begins with the image; with --json there is a line for each,
    with the image as `source`.

    Examples:
        blipq caption photo.jpg
        blipq caption *.jpg --json
        ls *.jpg | blipq caption -
        blipq caption s3://photos/1.jpg --best-of 3 --set num_beams=1
        blipq caption *.jpg --min-confidence 0.6
        blipq caption s3://photos/1.jpg --no-wait --output s3://blipq-outputs/1.json
    """
    parameters = _generation(generation)

    def submit(image: str) -> Job[Any]:
        return client.caption(
            image,
            prompt,
            best_of=best_of,
            generation=parameters,
            min_confidence=min_confidence,
            **options,
        )

    if len(images) == 1 and images != ["-"]:
        return submit(images[0])
    for name in ("idempotency_key", "output"):
        if options.get(name) is not None:
            raise InvalidRequest(f"--{name.replace('_', '-')} is of one image: give a single one")
    return Several(named(images), submit)


@verb
def vqa(
    client: Client,
    image: ImageArgument,
    questions: Annotated[list[str], typer.Argument(help="One or more questions.")],
    choices: Annotated[
        list[str] | None,
        typer.Option("--choice", help="An answer to choose from; give two or more."),
    ] = None,
    min_confidence: ConfidenceOption = None,
    generation: GenerationOption = None,
    **options: Unpack[OptionFields],
) -> Job[Any]:
    """Ask questions about an image.

    Examples:
        blipq vqa photo.jpg "how many dogs are there?"
        blipq vqa s3://photos/1.jpg "what is it?" "is it red?" --priority high
        blipq vqa photo.jpg "what is it?" --choice cat --choice dog
    """
    if choices is not None and len(choices) == 1:
        raise InvalidRequest("--choice: give two or more")
    parameters = _generation(generation)
    return client.vqa(
        image,
        questions,
        choices=choices,
        generation=parameters,
        min_confidence=min_confidence,
        **options,
    )


@verb
def match(
    client: Client,
    image: ImageArgument,
    texts: Annotated[list[str], typer.Argument(help="One or more texts.")],
    head: Annotated[str, typer.Option(help="itm: a probability; itc: a cosine.")] = "itm",
    explain: Annotated[bool, typer.Option("--explain", help="Add where itm looked.")] = False,
    **options: Unpack[OptionFields],
) -> Job[Any]:
    """Score texts against an image.

    Examples:
        blipq match photo.jpg "a cat" "a dog"
        blipq match s3://photos/1.jpg "a cat" --head itc
    """
    # pydantic checks the head and names the choices
    return client.match(image, texts, head=head, explain=explain, **options)  # type: ignore[arg-type]


@verb
def embed(
    client: Client,
    image: Annotated[
        str | None, typer.Argument(help="s3://bucket/key, https://..., or a local file to upload.")
    ] = None,
    text: Annotated[
        str | None, typer.Option(help="A text, instead of an image or with it.")
    ] = None,
    mode: Annotated[
        str | None, typer.Option(help="image, text or multimodal; by default what is given.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="float16 or float32.")] = "float16",
    index: Annotated[str | None, typer.Option(help="Put the image into this search index.")] = None,
    **options: Unpack[OptionFields],
) -> Job[Any]:
    """Get the features of an image, of a text, or of both together.

    Examples:
        blipq embed photo.jpg --json
        blipq embed --text "a cat" --json
    """
    # pydantic checks them, and names the choices
    fields: dict[str, Any] = {"mode": mode, "dtype": dtype, "index": index}
    return client.embed(image, text, **fields, **options)


@verb
def describe(
    client: Client,
    image: ImageArgument,
    questions: Annotated[
        list[str] | None, typer.Option("--question", help="A question; may be given again.")
    ] = None,
    texts: Annotated[
        list[str] | None, typer.Option("--text", help="A text to score; may be given again.")
    ] = None,
    caption: Annotated[bool, typer.Option(help="Ask for a caption.")] = True,
    embed: Annotated[bool, typer.Option("--embed", help="Ask for the image's features.")] = False,
    min_confidence: ConfidenceOption = None,
    generation: GenerationOption = None,
    **options: Unpack[OptionFields],
) -> Job[Any]:
    """Ask for several things about an image at once.

    Examples:
        blipq describe photo.jpg --question "is it red?" --text "a cat"
        blipq describe photo.jpg --no-caption --embed --text "a cat" --json
    """
    return client.describe(
        image,
        caption=caption,
        questions=questions or (),
        texts=texts or (),
        embed=embed,
        generation=_generation(generation),
        min_confidence=min_confidence,
        **options,
    )


def status(id: IdArgument, as_json: JsonOption = False) -> None:
    """Show where a job is, and when no live worker serves its model.

    Examples:
        blipq status job_0197f2a0-5c7e-7d3b-9a51-3c1d6e0f4a2b
    """
    with connected(as_json) as client:
        info = client.job(id).info()
        if as_json:
            print_json(info)
        else:
            out.print(status_line(info), markup=False)


def result(id: IdArgument, timeout: TimeoutOption = 60.0, as_json: JsonOption = False) -> None:
    """Wait for a job and print its result.

    Examples:
        blipq result job_0197f2a0-5c7e-7d3b-9a51-3c1d6e0f4a2b --timeout 300
    """
    with connected(as_json) as client:
        follow(client.job(id), True, timeout, as_json)
