"""``blipq search``."""

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Unpack

import typer

from blipq.cli.terminal.options import Then, verb
from blipq.cli.terminal.output import errors
from blipq.client.job import Job
from blipq.client.sync_client import Client
from blipq.contract import OptionFields, SearchResult
from blipq.errors import BlipqError, InvalidRequest
from blipq.s3.storage import Storage

NEEDED = ("PIL", "jinja2")


@verb
def search(
    client: Client,
    text: Annotated[str | None, typer.Argument(help="What to look for.")] = None,
    index: Annotated[str, typer.Option("--name", help="The index.")] = ...,  # type: ignore[assignment]  # required
    image: Annotated[
        str | None, typer.Option(help="An image to look for, instead of a text.")
    ] = None,
    top_k: Annotated[int, typer.Option(help="Most hits.")] = 10,
    rerank: Annotated[
        int, typer.Option(help="How many of the nearest are looked at again with the text.")
    ] = 128,
    filter: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE", help="Metadata of hits; a name given again adds a value."
        ),
    ] = None,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write a page with the pictures.")
    ] = None,
    **options: Unpack[OptionFields],
) -> tuple[Job[Any], Then | None]:
    """Find images in an index by a text, or by an image.

    Examples:
        blipq search "a red circle" --name photos
        blipq search "a dog" --name photos --filter year=2026 --html hits.html
        blipq search --image photo.jpg --name photos --top-k 20 --json
    """
    if html is not None and not all(map(importlib.util.find_spec, NEEDED)):
        raise BlipqError("a part is missing for --html: pip install 'blipq[search]'")
    job = client.search(
        index,
        text,
        image=image,
        top_k=top_k,
        rerank=rerank,
        filter=any_of(filter, "--filter"),
        **options,
    )
    if html is None:
        return job, None
    title = f"{index}: {text or Path(image or '').name}"
    return job, lambda ended: _write_page(ended.result(timeout=0), html, title, client.storage)


def any_of(texts: Sequence[str] | None, option: str) -> Mapping[str, list[str]] | None:
    """``NAME=VALUE`` texts as the values of each name. Raises InvalidRequest."""
    values: dict[str, list[str]] = {}
    for text in texts or ():
        name, equals, value = text.partition("=")
        if not equals:
            raise InvalidRequest(f"{option}: {text!r} is not of the form NAME=VALUE")
        values.setdefault(name.strip(), []).append(value.strip())
    return values or None


def _write_page(result: SearchResult, path: Path, title: str, storage: Storage) -> None:
    """Pillow and Jinja are imported only here: few clients have them."""
    from blipq.index.gallery import write_page

    write_page(result, title, path, storage)
    errors.print(f"written: {path}", markup=False)
