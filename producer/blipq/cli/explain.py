"""``blipq explain``."""

import importlib.util
from pathlib import Path
from typing import Annotated, Any, Unpack

import typer

from blipq.cli.terminal.options import Then, verb
from blipq.cli.terminal.output import errors
from blipq.client.job import Job
from blipq.client.sync_client import Client
from blipq.contract import MatchResult, OptionFields
from blipq.errors import BlipqError, InvalidRequest
from blipq.files import is_same, whole_file
from blipq.s3.storage import to_upload
from blipq.submission import uploadable

#: The longer side of what is drawn, in pixels.
SIDE = 1024


@verb
def explain(
    client: Client,
    image: Annotated[
        str, typer.Argument(help="s3://bucket/key, or a local file to upload: it is drawn on.")
    ],
    text: Annotated[str, typer.Argument(help="What to look for.")],
    png: Annotated[
        Path, typer.Option("--png", metavar="FILE", help="Where the heat map is drawn.")
    ] = Path("heat.png"),
    **options: Unpack[OptionFields],
) -> tuple[Job[Any], Then | None]:
    """Show where in an image a text was found.

    Prints how well they match, and maps of the text and of its words: the fuller a character, the
    more. The text's map is also drawn over the image in grey, from blue to yellow.

    Examples:
        blipq explain photo.jpg "a dog on a beach"
        blipq explain s3://photos/1.jpg "a red car" --png car.png
    """
    if importlib.util.find_spec("PIL") is None:
        raise BlipqError("Pillow is missing to draw: pip install 'blipq[search]'")
    if image.lower().startswith(("https://", "http://")):
        raise InvalidRequest("explain draws on a local file or an s3:// object, not on a URL")
    return submitted(client, image, text, png, options)


def submitted(
    client: Client, image: str, text: str, png: Path, options: OptionFields
) -> tuple[Job[Any], Then]:
    """The job, and what draws its map. Raises InvalidRequest before there is one."""
    source = uploadable(image, local_paths=client.settings.local_paths)
    _require_writable(png, source)
    # A pipe can be read once: what is uploaded is what is drawn on.
    data = None if source is None else to_upload(source)[0]
    job = client.match(image if data is None else data, text, explain=True, **options)

    def draw(ended: Job[Any]) -> None:
        _draw(ended, client.storage.read(image) if data is None else data, png)

    return job, draw


def _require_writable(png: Path, source: str | bytes | None) -> None:
    """Raises InvalidRequest early: the job may wait for hours."""
    if not png.name or png.is_dir():
        raise InvalidRequest(f"--png: {str(png)!r} is no name of a file")
    if not png.absolute().parent.is_dir():
        raise InvalidRequest(f"--png: there is no folder {png.absolute().parent}")
    if isinstance(source, str) and is_same(png, source):
        raise InvalidRequest(f"--png: {png} is the picture itself: give another file")


def _draw(job: Job[Any], data: bytes, png: Path) -> None:
    """Pillow is imported only here: few clients have it. Raises BlipqError."""
    from blipq.images.decoding import decode
    from blipq.images.heat import heat_of
    from blipq.images.overlay import as_png, fitted, overlay

    found: MatchResult = job.result(timeout=0)
    assert found.best.map is not None
    picture = decode(data)
    drawn = overlay(picture, heat_of(found.best.map), fitted(picture.size, SIDE))
    try:
        with whole_file(png) as file:
            file.write(as_png(drawn))
    except OSError as error:
        raise BlipqError(f"cannot write {png}: {error.strerror}") from error
    errors.print(f"written: {png}", markup=False)
