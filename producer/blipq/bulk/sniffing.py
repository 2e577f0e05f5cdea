"""What a file is that is no manifest: one error, instead of a refusal of each of its lines."""

import codecs
import re

from blipq.errors import InvalidRequest

_LOOKED_AT = 4096
_BINARY = (
    (b"\x1f\x8b", "gzip: unpack it (gunzip)"),
    (b"\x28\xb5\x2f\xfd", "zstd: unpack it (unzstd)"),
    (b"BZh", "bzip2: unpack it (bunzip2)"),
    (b"\xfd7zXZ\0", "xz: unpack it (unxz)"),
    (b"PK\x03\x04", "a ZIP or a workbook of Excel: export it"),
    (b"PAR1", "Parquet: export it, or install blipq-datasets"),
    (b"ARROW1", "Arrow: export it"),
    (codecs.BOM_UTF16_LE, "UTF-16: save it as UTF-8"),
    (codecs.BOM_UTF16_BE, "UTF-16: save it as UTF-8"),
)
#: A heading of columns, with a field that each request has among them.
_HEADING = re.compile(rb'[\w" .-]+([,;\t])[\w" .,;\t-]+')
_FIELDS = re.compile(rb"\b(custom_id|kind|image)\b")
_SEPARATED = {b",": "CSV", b";": "CSV", b"\t": "TSV"}


def check_manifest(name: str, start: bytes) -> None:
    """Raises InvalidRequest where the first bytes of a manifest are of something else."""
    found = _found(start[:_LOOKED_AT])
    if found is not None:
        raise InvalidRequest(
            f"{name} is {found}. A manifest has one JSON object per line (JSON Lines, UTF-8), such "
            'as {"custom_id": "1", "kind": "caption", "image": "s3://photos/1.jpg"}'
        )


def _found(start: bytes) -> str | None:
    for magic, found in _BINARY:
        if start.startswith(magic):
            return found
    text = start.removeprefix(codecs.BOM_UTF8).lstrip()
    if b"\0" in text[:4]:
        return "UTF-16 or UTF-32: save it as UTF-8"
    if text.startswith(b"["):
        return "one JSON array: write its elements a line each (jq -c '.[]')"
    if re.match(rb"\{\s*\r?\n", text):
        return "JSON over several lines: write an object per line (jq -c .)"
    if b"\n" not in text and re.search(rb"\}\r\s*\{", text):
        return "a file whose lines end in CR alone: write LF (tr '\\r' '\\n')"
    return _separated(text.partition(b"\n")[0].rstrip(b"\r"))


def _separated(line: bytes) -> str | None:
    """What a heading of columns makes of a file, or None."""
    heading = _HEADING.fullmatch(line)
    if heading is None or not _FIELDS.search(line):
        return None
    return f"{_SEPARATED[heading[1]]}: make an object of each row, or install blipq-datasets"
