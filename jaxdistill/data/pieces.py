"""Documents of any length as pieces that fit in memory once they are tokenised, which takes a hundred times as much."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

LONGEST = 1 << 20  # characters


def pieces(text: str) -> list[str]:
    """The text in pieces of at most `LONGEST` characters; each ends where a line does, else at white space, else where it must.

    Joined, with the line ends or white space that stood between them, they are the text.
    """
    if len(text) <= LONGEST:
        return [text]
    found, rest = cut(text)
    return [*found, rest] if rest else found


def cut(text: str) -> tuple[list[str], str]:
    """The pieces before the last, and that: it may go on where the text does, for a cut depends on nothing that comes after it."""
    found, start = [], 0
    while len(text) - start > LONGEST:
        end = start + LONGEST
        line_end = text.rfind("\n", start + 1, end + 1)
        space = line_end if line_end > 0 else next((i for i in range(end, start, -1) if text[i].isspace()), None)
        found.append(text[start : end if space is None else space])
        start = end if space is None else space + 1
    return found, text[start:]


def decode(data: bytes) -> tuple[str, bool]:
    """The text, and whether it was valid UTF-8; what is none becomes U+FFFD."""
    try:
        return data.decode("utf-8"), True
    except UnicodeDecodeError:
        return data.decode("utf-8", "replace"), False


def text_documents(lines: Iterable[bytes]) -> Iterator[tuple[str, bool]]:
    """The documents of a text file, which lie between blank lines, and whether they were valid UTF-8.

    Of a long one the first pieces come before all of it is read, so that a file without blank lines is never in memory whole.
    """
    block = _Block()
    for line in lines:
        if line.strip():
            yield from block.add(line)
        else:
            yield from block.end()
            block = _Block()
    yield from block.end()


class _Block:
    """The lines since the last blank one, but for what is a piece already."""

    def __init__(self):
        self._begun: str | None = None  # read and decoded
        self._lines: list[bytes] = []  # after that
        self._size, self._valid = 0, True

    def _text(self) -> str:
        text, valid = decode(b"\n".join(self._lines))
        self._valid = self._valid and valid
        return text if self._begun is None else f"{self._begun}\n{text}" if self._lines else self._begun

    def add(self, line: bytes) -> Iterator[tuple[str, bool]]:
        """The pieces that the line completes; it may be one that is longer than a piece."""
        self._lines.append(line.rstrip(b"\r\n"))
        self._size += len(line)
        if self._size > LONGEST:  # in bytes: characters are not more
            found, self._begun = cut(self._text())
            self._lines, self._size = [], 0
            yield from ((piece, self._valid) for piece in found)

    def end(self) -> Iterator[tuple[str, bool]]:
        if self._begun or self._lines:
            text = self._text()
            yield text, self._valid
