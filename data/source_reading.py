"""Reading: the documents or images of one unit of a source, in order."""

import codecs
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image

from data.compression import BROKEN, is_compressed, open_bytes
from data.config import parse_given
from data.sources import DOCUMENT_BYTES, Form, SourceFile


@dataclass(frozen=True)
class Document:
    """One text; `where` names it in messages."""

    text: str
    where: str


@dataclass(frozen=True)
class EncodedImage:
    """One image as its file holds it, and its class; `where` names it in messages."""

    encoded: bytes
    label: int
    where: str


@dataclass(frozen=True)
class UnitInput:
    """All that is needed to read a unit: consecutive files, from place `start` of the first to `stop` of the last."""

    given: str
    form: Form
    state: str
    files: tuple[SourceFile, ...]
    start: int
    stop: int

    @property
    def into(self) -> str | None:
        """The split that all of it goes into; None: divided by content."""
        return parse_given(self.given).into


def read_unit(unit: UnitInput) -> Iterator[Document | EncodedImage]:
    """The documents or images of a unit; a ValueError of one line names the file that is not what it should be."""
    if unit.form == "digits":
        return _digits()
    if unit.form == "hub":
        from data.hub import read_shards

        return read_shards(unit)
    if unit.form == "images":
        return _read_images(unit)
    return _READERS[unit.form](unit)


def _parts(unit: UnitInput) -> Iterator[tuple[Path, int, int | None]]:
    """Each file of a unit and the places to read in it, `None` for its end; a ValueError if the file has changed."""
    for number, file in enumerate(unit.files):
        path = Path(file.path)
        try:
            status = path.stat()
        except OSError as error:
            raise _unreadable(path, error) from None
        if status.st_size != file.size or (file.stamp and status.st_mtime_ns != file.stamp):
            raise ValueError(f"source {path}: was changed while it was being prepared; prepare again")
        last = number == len(unit.files) - 1
        yield path, unit.start if number == 0 else 0, unit.stop if last else None


def _unreadable(path: Path, error: Exception) -> ValueError:
    if isinstance(error, OSError) and error.strerror is not None:
        return ValueError(f"source {path}: cannot be read ({error.strerror}); correct data.source or its permissions")
    what = f"{path.suffix} file" if is_compressed(path) else "file"
    return ValueError(f"source {path}: not a whole {what} ({' '.join(str(error).split())}); replace it")


def _decode(content: bytes, where: Callable[[], str], first: int = 0) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"source {where()}: not UTF-8 at byte {first + error.start}; convert the file or remove it"
        ) from None


def _read_texts(unit: UnitInput) -> Iterator[Document]:
    for path, _, _ in _parts(unit):
        try:
            with open_bytes(path) as file:
                content = file.read()
        except (OSError, *BROKEN) as error:
            raise _unreadable(path, error) from None
        yield Document(_decode(content, lambda path=path: str(path)), str(path))  # type: ignore[misc]


def lines_of(path: Path, start: int, stop: int | None) -> Iterator[tuple[int, bytes]]:
    """The lines that begin at bytes [start, stop) of a file, and where each begins. A compressed file is read whole."""
    try:
        with open_bytes(path) as file:
            if is_compressed(path):
                start, stop = 0, None
            position = _next_line(file, start, stop) if start else 0
            if position is None:
                return
            for line in file:
                if stop is not None and position >= stop:
                    break
                yield position, line
                position += len(line)
    except (OSError, *BROKEN) as error:
        raise _unreadable(path, error) from None


def _next_line(file: BinaryIO, start: int, stop: int | None) -> int | None:
    """Go to the first line that begins at bytes [start, stop), and return where that is; None if none does. Nothing from `stop`
    on is read: of a file that is one long line, each unit would else read all the rest."""
    file.seek(start - 1)
    skipped = file.readline(-1 if stop is None else stop - start)
    return start - 1 + len(skipped) if skipped.endswith(b"\n") else None


def _line_at(path: Path, position: int) -> str:
    """The name of the line that begins at a byte of a file, by its number. For messages: it reads all before it."""
    with open_bytes(path) as file:
        number, read = 1, 0
        for line in file:
            if read >= position:
                break
            number, read = number + 1, read + len(line)
    return f"{path}:{number}"


def _cut_lines(unit: UnitInput) -> Iterator[Document]:
    """The parts of a file that is all the text there is: as one document it could not be split for validation."""
    for path, start, stop in _parts(unit):
        lines: list[bytes] = []
        size, first = 0, start
        for position, line in lines_of(path, start, stop):
            if not lines:
                first = position
            lines.append(line)
            size += len(line)
            if size >= DOCUMENT_BYTES:
                yield _cut(path, lines, first)
                lines, size = [], 0
        if lines:
            yield _cut(path, lines, first)


def _cut(path: Path, lines: list[bytes], first: int) -> Document:
    return Document(_decode(b"".join(lines), lambda: str(path), first), f"{path}, byte {first}")


def _read_jsonl(unit: UnitInput) -> Iterator[Document]:
    field = parse_given(unit.given).address.column
    assert field is not None
    for path, start, stop in _parts(unit):
        for position, line in lines_of(path, start, stop):
            if position == 0:  # JSON has no byte order mark, but some editors write one before it
                line = line.removeprefix(codecs.BOM_UTF8)
            if not line.strip():
                continue

            def where(path: Path = path, position: int = position) -> str:
                return _line_at(path, position)

            text = _decode(line, where)
            try:
                record = json.loads(text)
            except (ValueError, RecursionError) as error:  # a ValueError alone: a number of thousands of digits
                raise ValueError(f"source {where()}: not JSON ({error}); correct the line or remove it") from None
            content = record.get(field) if isinstance(record, dict) else None
            if not isinstance(content, str):
                raise ValueError(f"source {where()}: no text under {field!r}; correct the line or the field's name")
            yield Document(content, f"{path}, byte {position}")


def row_group_bytes(path: Path, column: str) -> tuple[int, ...]:
    """The bytes of a column in each row group of a Parquet file, uncompressed. ValueError where it is none."""
    with _parquet(path, column) as table:
        metadata, names = table.metadata, table.schema_arrow.names
        # A nested column before this one would shift its place among the file's columns: then the whole row counts.
        flat = metadata.num_columns == len(names)
        groups = (metadata.row_group(number) for number in range(metadata.num_row_groups))
        place = names.index(column)
        return tuple(
            int(group.column(place).total_uncompressed_size if flat else group.total_byte_size) for group in groups
        )


def _parquet(path: Path, column: str) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"source {path}: not a Parquet file ({' '.join(str(error).split())})") from None
    if column not in table.schema_arrow.names:
        raise ValueError(f"source {path}: no column {column!r}; its columns are {table.schema_arrow.names}")
    return table


def _read_parquet(unit: UnitInput) -> Iterator[Document]:
    column = parse_given(unit.given).address.column
    assert column is not None
    for path, start, stop in _parts(unit):
        with _parquet(path, column) as table:
            stop = table.metadata.num_row_groups if stop is None else stop
            row = sum(table.metadata.row_group(number).num_rows for number in range(start))
            for number in range(start, stop):
                for text in _texts_of_group(table, path, number, column, row):
                    yield Document(text, f"{path}, row {row}")
                    row += 1


def _texts_of_group(table: Any, path: Path, group: int, column: str, row: int) -> Iterator[str]:
    """The texts of a row group, whose first row is `row` of the file."""
    import pyarrow as pa

    # Batch by batch: of several row groups at once pyarrow reads ahead, and holds them.
    batches = table.iter_batches(batch_size=1024, row_groups=[group], columns=[column])
    while True:
        try:
            batch = next(batches, None)
        except (pa.ArrowException, OSError) as error:
            raise ValueError(
                f"source {path}: row group {group}, from row {row} on, cannot be read ({' '.join(str(error).split())}); "
                "replace the file"
            ) from None
        if batch is None:
            return
        try:
            texts = batch.column(0).to_pylist()
        except UnicodeDecodeError:
            raise _not_utf8(batch.column(0), path, column, row) from None
        for text in texts:
            if not isinstance(text, str):
                raise ValueError(f"source {path}: row {row} of column {column!r} is not text but {text!r:.40}")
            yield text
            row += 1


def _not_utf8(texts: Any, path: Path, column: str, row: int) -> ValueError:
    """What to say of a column of which not all texts can be decoded; the first is that of `row`."""
    for number, text in enumerate(texts, row):
        try:
            text.as_py()
        except UnicodeDecodeError as error:
            return ValueError(
                f"source {path}: row {number} of column {column!r} is not UTF-8 at byte {error.start}; convert or remove it"
            )
    raise AssertionError("all of them can be decoded")


def _read_images(unit: UnitInput) -> Iterator[EncodedImage]:
    for file, (path, _, _) in zip(unit.files, _parts(unit), strict=True):
        assert file.label is not None
        try:
            encoded = path.read_bytes()
        except OSError as error:
            raise _unreadable(path, error) from None
        yield EncodedImage(encoded, file.label, str(path))


def _digits() -> Iterator[EncodedImage]:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ValueError("source digits needs scikit-learn; install it with `pip install 'lockstep[digits]'`") from None
    bunch = load_digits()
    for number, (pixels, label) in enumerate(zip(bunch.images, bunch.target, strict=True)):
        buffer = io.BytesIO()
        # 17 levels of grey, 0 to 16, spread over 0 to 255.
        Image.fromarray((pixels * 255 / 16).round().astype("uint8")).save(buffer, format="PNG")
        yield EncodedImage(buffer.getvalue(), int(label), f"digit {number}")


_READERS: dict[str, Callable[[UnitInput], Iterator[Document]]] = {
    "texts": _read_texts,
    "lines": _cut_lines,
    "jsonl": _read_jsonl,
    "parquet": _read_parquet,
}
