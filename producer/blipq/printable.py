"""Texts that strangers chose, such as an object's key, as a terminal or a log may show them."""

# All that a terminal may obey: ESC, the C1 controls that some take for ESC, those that move the
# cursor back over what was printed, and those that turn the direction of what follows. Lines and
# tabs stay; Unicode's own ends of lines do not: only some programs see one there.
_CODES = (*range(0x20), *range(0x7F, 0xA0), *range(0x2028, 0x202F), *range(0x2066, 0x206A))
_CONTROLS = {
    code: f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
    for code in _CODES
    if chr(code) not in "\n\t"
}


def printable(text: str) -> str:
    r"""The text with its control characters written out, as in ``\x1b`` and ``\u202e``."""
    return text.translate(_CONTROLS)
