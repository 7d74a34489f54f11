"""Printing arbitrary text safely."""

import re
import sys


def printable(text: str) -> str:
    """Escape control characters, which could upset a terminal."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda match: f"\\x{ord(match[0]):02x}", text)


def one_line(text: str) -> str:
    """The text on one line, with characters that standard output cannot encode escaped."""
    encoding = sys.stdout.encoding or "utf-8"
    return printable(text).replace("\n", r"\n").encode(encoding, "backslashreplace").decode(encoding)
