"""Commands of the HTTP door: the process that answers, and its keys."""

from pathlib import Path
from typing import Annotated

import typer

from blipq.cli.terminal.group import Group
from blipq.cli.terminal.output import errors, reported
from blipq.errors import BlipqError, InvalidRequest
from blipq.local.door import NO_DOOR
from blipq.program import blipq
from blipq.submission import checked

app = Group("Answer HTTP: jobs, uploads, queues and webhooks for services in any language.")
keys = Group("Keys of the HTTP door.")
app.add_typer(keys, name="keys")

_LIST = "May be repeated; * allows all."


@app.callback(invoke_without_command=True, no_args_is_help=False)
def api(
    context: typer.Context,
    host: Annotated[
        str, typer.Option(help="Address to listen on. Any but loopback's needs keys.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 8321,
    make_key: Annotated[
        bool,
        typer.Option(
            "--make-key",
            help="Where the file of keys is missing, make it, with one key that may do everything.",
        ),
    ] = False,
) -> None:
    """Answer HTTP until SIGTERM: jobs, uploads, queues, webhooks. Exit code 78 without keys.

    Without BLIPQ_API_KEYS it serves this machine alone. The log of requests goes to stdout, a JSON
    object a line. --make-key keeps the new key beside the file, as keys.key for keys.toml.

    Examples:
        blipq api
        BLIPQ_API_KEYS=keys.toml blipq api --host 0.0.0.0
        BLIPQ_API_KEYS=keys.toml blipq api --host 0.0.0.0 --make-key
    """
    if context.invoked_subcommand is not None:
        return
    with reported():
        try:
            from blipq_api import server
            from blipq_api.settings import ApiSettings
        except ModuleNotFoundError as error:
            if (error.name or "").startswith("blipq"):
                raise
            raise BlipqError(NO_DOOR) from None
        settings = checked(ApiSettings)
        if make_key:
            _make_key(settings.api_keys)
        if settings.api_keys is None and not server.is_loopback(host):
            text = f"{host} is not loopback: set BLIPQ_API_KEYS, and make a key with "
            errors.print(f"blipq: {text}{blipq('api keys new NAME')}", style="red", markup=False)
            raise typer.Exit(server.EXIT_NO_KEYS)
        server.run(settings, host, port, lambda text: errors.print(text, markup=False))


def _make_key(file: Path | None) -> None:
    from blipq_api.access.keys import make_first_key

    if file is None:
        raise InvalidRequest("--make-key: set BLIPQ_API_KEYS to the file of keys")
    kept = make_first_key(file)
    if kept is not None:
        errors.print(f"made {file}; its key is in {kept}", markup=False)


@keys.command("new")
def new(
    name: Annotated[str, typer.Argument(help="What the log calls the key.")],
    tenant: Annotated[
        str | None, typer.Option(help="Whose jobs it submits and sees; by default the name.")
    ] = None,
    file: Annotated[
        Path | None, typer.Option(envvar="BLIPQ_API_KEYS", help="File that it is added to.")
    ] = None,
    scope: Annotated[
        list[str] | None, typer.Option(help="submit, read, cancel or admin; all but admin.")
    ] = None,
    model: Annotated[list[str] | None, typer.Option(help=f"Model. {_LIST}")] = None,
    bucket: Annotated[
        list[str] | None, typer.Option(help=f"Bucket, or bucket/folder, of images. {_LIST}")
    ] = None,
    image_host: Annotated[list[str] | None, typer.Option(help=f"Host of images. {_LIST}")] = None,
    index: Annotated[list[str] | None, typer.Option(help=f"Search index. {_LIST}")] = None,
    output: Annotated[
        list[str] | None, typer.Option(help=f"Bucket, or bucket/folder, of outputs. {_LIST}")
    ] = None,
    webhook_host: Annotated[
        list[str] | None, typer.Option(help=f"Host of webhooks. {_LIST}")
    ] = None,
) -> None:
    """Print a new key, and add its SHA-256 to the file. The key itself is kept nowhere.

    A door that runs takes the file's changes within a second.

    Examples:
        blipq api keys new shop --file keys.toml --bucket photos
    """
    with reported():
        try:
            from blipq_api.access.keys import add_key
        except ModuleNotFoundError as error:
            if (error.name or "").startswith("blipq"):
                raise
            raise BlipqError(NO_DOOR) from None
        if file is None:
            raise InvalidRequest("--file: name the file of keys, or set BLIPQ_API_KEYS")
        lists = {
            "scopes": scope or [],
            "models": model or [],
            "buckets": bucket or [],
            "image_hosts": image_host or [],
            "indexes": index or [],
            "outputs": output or [],
            "webhook_hosts": webhook_host or [],
        }
        print(add_key(file, name, tenant or name, lists))
