"""Compressed files, unpacked as they are read: to their last byte, or an error."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxdistill.errors import InputError

ENDINGS = (".gz", ".bz2", ".xz", ".zst")
CHUNK = 1 << 18


class _Streams(io.RawIOBase):
    """Streams of bz2 or xz one after the other, with nothing but zeros between them.

    Python's own readers take whatever follows the first stream and is none for padding: of a file of many (pbzip2, pixz, the dumps of
    Wikipedia) a flipped bit would cost the rest, without a word.
    """

    def __init__(self, packed: Any, new_stream: Callable[[], Any]):
        self._packed, self._new_stream = packed, new_stream
        self._stream = new_stream()
        self._rest = b""  # read, and not yet given to a stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._stream.eof or self._next_stream():
            if data := self._unpacked(len(buffer)):
                buffer[: len(data)] = data
                return len(data)
        return 0

    def _unpacked(self, size: int) -> bytes:
        """At most so many of the next bytes of the stream; there may be none yet."""
        if not self._rest and self._stream.needs_input:
            self._rest = self._packed.read(CHUNK)
            if not self._rest:
                raise EOFError("it ends in the middle of a stream")
        packed, self._rest = self._rest, b""
        return self._stream.decompress(packed, size)

    def _next_stream(self) -> bool:
        """Begins the stream that follows, if one does."""
        packed, rest = self._stream.unused_data or self._packed.read(CHUNK), b""
        while packed and not (rest := packed.lstrip(b"\0")):
            packed = self._packed.read(CHUNK)
        if rest:
            self._stream, self._rest = self._new_stream(), rest
        return bool(rest)


def decompressed(raw: io.BufferedReader, path: str) -> Any:
    """The bytes that the name's ending says are packed in the file `raw`; of another ending, `raw` itself.

    Raises:
      InputError: an empty file, which holds no stream, not even one of nothing.
    """
    ending = Path(path).suffix.lower()
    if ending not in ENDINGS:
        return raw
    if not raw.peek(1):
        raise InputError(f"{path}: is empty, which no compressed file is")
    if ending == ".gz":
        return gzip.GzipFile(fileobj=raw)
    if ending == ".zst":
        import pyarrow as pa

        return io.BufferedReader(pa.CompressedInputStream(pa.PythonFile(raw, "r"), "zstd"), CHUNK)
    new_stream = bz2.BZ2Decompressor if ending == ".bz2" else lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ)
    return io.BufferedReader(_Streams(raw, new_stream), CHUNK)
