"""Texts that strangers chose, such as an object's key, as a terminal or a log may show them."""

# All that a terminal may obey: ESC, the C1 controls that some take for ESC, and those that move the
# cursor back over what was printed. Lines and tabs stay.
_CONTROLS = {
    code: f"\\x{code:02x}" for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"
}


def printable(text: str) -> str:
    r"""The text with its control characters written out, as in ``\x1b``."""
    return text.translate(_CONTROLS)
