"""Compressed files, read as streams. Which one a file is, its name says."""

import bz2
import gzip
import io
import lzma
import zlib
from pathlib import Path
from typing import BinaryIO, cast

SUFFIXES = (".gz", ".bz2", ".xz", ".zst")
# Text is about so many times larger than its compressed file: for the time left and the size of shards, not for sizes in memory.
COMPRESSED_RATIO = 4
# What the libraries raise for a file that is cut short or is none of theirs; pyarrow raises OSError without a number.
BROKEN = (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile)


def is_compressed(path: str | Path) -> bool:
    """Whether the file's name ends as those of compressed files do."""
    return str(path).endswith(SUFFIXES)


def open_bytes(path: Path) -> BinaryIO:
    """A file's content, decompressed where it is compressed, for reading once from start to end."""
    if path.name.endswith(".gz"):
        return cast(BinaryIO, gzip.open(path, "rb"))
    if path.name.endswith(".bz2"):
        return cast(BinaryIO, bz2.open(path, "rb"))
    if path.name.endswith(".xz"):
        return cast(BinaryIO, lzma.open(path, "rb"))
    if path.name.endswith(".zst"):
        import pyarrow as pa

        return cast(BinaryIO, io.BufferedReader(pa.input_stream(str(path), compression="zstd"), 1 << 20))
    return path.open("rb")
