"""What may be shown of URLs and of other libraries' errors: no password, key or signature.

Every error of blipq, every finding of ``blipq doctor`` and every line that its processes log passes
``redacted``. It knows secrets by where they stand, so that it needs no settings; whoever has the
settings can name further ones.
"""

import logging
import re
import sys
import threading
import traceback
from collections.abc import Iterable
from types import TracebackType

from blipq.printable import printable

HIDDEN = "***"

#: Schemes whose paths may hold an @ (``logo@2x.png``), and which carry no password behind a slash.
_PATHS = r"(?:s3|file|https?)"

# What strangers wrote is looked through as well. Each repetition that may end in vain has a bound:
# without, a text of 40 kB took five seconds, in which no other thread runs. A token used as a
# password may have some 2,000 characters.
_RULES = (
    # A password with a raw / ? or # in it: all up to the last @ may be part of it.
    (
        re.compile(rf"\b((?!{_PATHS}://)[a-z][a-z0-9+.-]{{0,30}}://)\S{{0,4000}}@", re.I),
        rf"\1{HIDDEN}@",
    ),
    (re.compile(r"\b(https?://)[^\s/?#]{0,4000}@", re.I), rf"\1{HIDDEN}@"),
    # user:pass/word@host, which is no host:port/path@2x
    (
        re.compile(r"\b(https?://)[^\s/?#:@]{0,4000}:(?!\d{0,9}(?:[/?#\s]|$))\S{0,4000}@", re.I),
        rf"\1{HIDDEN}@",
    ),
    # Parameters: of presigned URLs, of tokens in webhooks, of sentinels.
    (
        re.compile(
            r"([?&;](?:[\w.-]{0,60}(?:passw(?:or)?d|secret|token|signature|credential|api[_-]?key|"
            r"accesskeyid)[\w.-]{0,60}|key|sig|auth)=)"
            r"[^\s&\"'<>]+",
            re.I,
        ),
        rf"\1{HIDDEN}",
    ),
    # The headers that sign a request, and what S3 servers repeat of them.
    (re.compile(r"\b(authorization['\"]?\s*[:=]\s*['\"]?)[^\r\n'\"]+", re.I), rf"\1{HIDDEN}"),
    (
        re.compile(
            r"\b((?:credential|signature|aws_?access_?key_?id|x-amz-security-token|"
            r"stringtosign|signatureprovided)['\"]?\s*[=:]\s*['\"]?)[^\s,&'\"]+",
            re.I,
        ),
        rf"\1{HIDDEN}",
    ),
    (re.compile(r"\bwhsec_[\w+/=-]+"), f"whsec_{HIDDEN}"),
    # Redis repeats the arguments of a command that it does not know, such as a renamed AUTH.
    (re.compile(r"(with args beginning with:).*", re.I), rf"\1 {HIDDEN}"),
)


def redacted(text: str, secrets: Iterable[str | None] = ()) -> str:
    """The text without what is secret in it; ``secrets`` are texts that are known to be."""
    for secret in secrets:
        if secret:
            text = text.replace(secret, HIDDEN)
    for pattern, shown in _RULES:
        text = pattern.sub(shown, text)
    return text


def place_of(url: str) -> str:
    """A URL without user, password, query and fragment, however badly it is written."""
    scheme, _, rest = url.partition("://")
    before, at, behind = rest.rpartition("@")
    # The @ of a path, where nothing stands before the path: unix:///run/redis@1.sock
    rest = behind if at and not before.startswith("/") else rest
    return f"{scheme}://{re.split('[?#]', rest)[0]}"


class Redacting(logging.Formatter):
    """Lines of a log, tracebacks included, without secrets and controls of a terminal.

    Only a record's first line begins at the margin, so that no text in it, such as an object's key,
    passes for a record of its own.
    """

    def format(self, record: logging.LogRecord) -> str:
        return _one_record(super().format(record))


def _one_record(text: str) -> str:
    return printable(redacted(text)).replace("\n", "\n    ")


def log_to_stderr(level: str, formatter: logging.Formatter) -> None:
    """Sets a process of blipq's up: its log and its last words go to stderr, without secrets."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter)
    logging.basicConfig(level=level, handlers=[handler])
    redact_tracebacks()


def redact_tracebacks() -> None:
    """From now on an exception that ends this process, or a thread of it, shows no secrets."""

    def show(
        kind: type[BaseException], error: BaseException | None, where: TracebackType | None
    ) -> None:
        text = "".join(traceback.format_exception(kind, error, where)).rstrip("\n")
        print(_one_record(text), file=sys.stderr, flush=True)

    def show_of_thread(args: threading.ExceptHookArgs) -> None:
        if args.exc_type is not SystemExit:
            show(args.exc_type, args.exc_value, args.exc_traceback)

    sys.excepthook = show
    threading.excepthook = show_of_thread
