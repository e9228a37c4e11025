"""JSON lines: a row a line, as training and calibration read them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import IO, Any

BOM = b"\xef\xbb\xbf"
"""What some editors put before a file's UTF-8."""


def rows(file: IO[bytes]) -> Iterator[tuple[int, int, bytes]]:
    """Number, first byte and text of each line of a file that is not blank; the text is understood by `parse`.

    Lines end at line feeds alone: JSON may have other separators that Unicode knows, such as U+2028, within a text.
    """
    begin = 0
    for number, line in enumerate(file, 1):
        text = line.removeprefix(BOM) if number == 1 else line
        if text.strip():
            yield number, begin + len(line) - len(text), text
        begin += len(line)


def parse(text: bytes | str) -> Any:
    """The value that a line, or a file, holds.

    Raises:
        ValueError: not JSON; it says why.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("lists within lists, too deep to read") from None
    except ValueError as error:
        raise ValueError(f"not JSON: {error}") from error
