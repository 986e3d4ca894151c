"""Shards of images: Arrow IPC files (`image: binary`, `label: int64`) that hold the bytes as the source encoded them."""

import contextlib
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from data.errors import CorruptData
from data.manifest import RESTORE, ShardEntry
from data.shards import CheckedFile, HashingFile
from data.store import Store

IMAGE_SCHEMA = pa.schema(
    [pa.field("image", pa.binary(), nullable=False), pa.field("label", pa.int64(), nullable=False)]
)
ROWS_PER_BATCH = 256
# `MessageHeader.RecordBatch` in Arrow's Message.fbs.
_RECORD_BATCH = 3


class ImageShardWriter:
    """Writes one image shard, image by image, in record batches of at most 256 rows."""

    def __init__(self, stem: Path) -> None:
        self._file = HashingFile(stem.with_name(stem.name + ".arrow"))
        self._writer = pa.ipc.new_file(self._file, IMAGE_SCHEMA)
        self._images: list[bytes] = []
        self._labels: list[int] = []
        # Arrow writes its magic number, padded to 8 bytes, and the schema only with the first batch.
        self._offsets = [8 + IMAGE_SCHEMA.serialize().size]
        self._rows = 0
        self.bytes = 0

    def add(self, image: bytes, label: int) -> None:
        """Append one encoded image."""
        self._images.append(image)
        self._labels.append(label)
        self._rows += 1
        self.bytes += len(image)
        if len(self._images) == ROWS_PER_BATCH:
            self._write_batch()

    def _write_batch(self) -> None:
        columns = [pa.array(self._images, pa.binary()), pa.array(self._labels, pa.int64())]
        self._writer.write_batch(pa.record_batch(columns, schema=IMAGE_SCHEMA))
        self._offsets.append(self._file.tell())
        self._images, self._labels = [], []

    def finish(self) -> ShardEntry:
        """Write the last batch and Arrow's footer, and close."""
        if self._images:
            self._write_batch()
        self._writer.close()
        return ShardEntry(documents=self._rows, data=self._file.finish(), batch_offsets=tuple(self._offsets))

    def close(self) -> None:
        """Give the shard up."""
        self._file.close()


class ImageShard:
    """One image shard, with labels of so many classes. Arrow parses nothing that has not been checked before."""

    def __init__(self, store: Store, entry: ShardEntry, classes: int) -> None:
        assert entry.batch_offsets is not None
        self.rows = entry.documents
        self._classes = classes
        self._offsets = entry.batch_offsets
        self._file = CheckedFile(store, entry.data)
        self._file.check(0, self._offsets[0])
        self._file.check(self._offsets[-1], entry.data.bytes)
        self._buffer = pa.py_buffer(self._file.map)
        with self._arrow_errors("an Arrow file"):
            reader = pa.ipc.open_file(self._buffer)
            batches = reader.num_record_batches
        if reader.schema != IMAGE_SCHEMA or not batches == len(self._offsets) - 1 == -(-self.rows // ROWS_PER_BATCH):
            raise CorruptData(f"{self._file.path}: not the columns and batches of an image shard; {RESTORE}")
        self._batches: dict[int, tuple[npt.NDArray[np.int32], npt.NDArray[np.int64], memoryview, int]] = {}

    def read(self, row: int) -> tuple[memoryview, int]:
        """The encoded bytes and the label of a row."""
        number, index = divmod(row, ROWS_PER_BATCH)
        ends, labels, data, data_start = self._batches.get(number) or self._open_batch(number)
        start, stop = int(ends[index]), int(ends[index + 1])
        self._file.check(data_start + start, data_start + stop)
        return data[start:stop], int(labels[index])

    def _open_batch(self, number: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64], memoryview, int]:
        """Check and parse a batch's header, offsets and labels; the images are checked as they are read."""
        start, stop = self._offsets[number], self._offsets[number + 1]
        batch = self._parse_batch(number, start, stop)
        rows = min(ROWS_PER_BATCH, self.rows - number * ROWS_PER_BATCH)
        _, ends_buffer, data_buffer = batch.column(0).buffers()
        buffers = (ends_buffer, batch.column(1).buffers()[1], data_buffer)
        if batch.num_rows != rows or any(buffer is None for buffer in buffers):
            raise CorruptData(f"{self._file.path}: record batch {number} is not laid out as prepared; {RESTORE}")
        places = [buffer.address - self._buffer.address for buffer in buffers]
        sizes = [(rows + 1) * 4, rows * 8, data_buffer.size]
        inside = all(start <= at and at + size <= stop for at, size in zip(places, sizes, strict=True))
        if not inside or any(buffer.size < size for buffer, size in zip(buffers, sizes, strict=True)):
            raise CorruptData(f"{self._file.path}: record batch {number} is not laid out as prepared; {RESTORE}")
        for place, size in zip(places[:2], sizes[:2], strict=True):
            self._file.check(place, place + size)
        ends = np.frombuffer(ends_buffer, dtype="<i4", count=rows + 1)
        if ends[0] != 0 or (ends[1:] < ends[:-1]).any() or ends[-1] > data_buffer.size:
            raise CorruptData(f"{self._file.path}: record batch {number} has impossible offsets; {RESTORE}")
        labels = np.frombuffer(buffers[1], dtype="<i8", count=rows)
        if labels.min() < 0 or labels.max() >= self._classes:
            raise CorruptData(
                f"{self._file.path}: record batch {number} has a label that is none of {self._classes} classes; {RESTORE}"
            )
        self._batches[number] = (ends, labels, memoryview(data_buffer), places[2])
        return self._batches[number]

    def _parse_batch(self, number: int, start: int, stop: int) -> pa.RecordBatch:
        """The record batch in bytes [start, stop), wherever the file's footer says that it lies; nothing is copied."""
        self._file.check(start, min(start + 8, stop))
        # Arrow's encapsulated message: a continuation marker, the length of the header (int32 each), the header.
        header_bytes = int.from_bytes(self._buffer[start + 4 : min(start + 8, stop)].to_pybytes(), "little")
        self._file.check(start, min(start + 8 + header_bytes, stop))
        with self._arrow_errors(f"in record batch {number} a part of an Arrow file"):
            message = pa.ipc.read_message(pa.BufferReader(self._buffer[start:stop]))
            if _is_compressed(message.metadata.to_pybytes()):
                raise pa.ArrowInvalid("compressed, so that its size is only claimed")
            return pa.ipc.read_record_batch(message, IMAGE_SCHEMA)

    @contextlib.contextmanager
    def _arrow_errors(self, what: str) -> Iterator[None]:
        """Whatever Arrow finds wrong is an error of what is stored."""
        try:
            yield
        except (pa.ArrowException, OSError, EOFError) as error:
            raise CorruptData(f"{self._file.path}: not {what} ({_one_line(error)}); {RESTORE}") from None


def _is_compressed(header: bytes) -> bool:
    """Whether the header of an Arrow message, a flatbuffer, is that of anything but an uncompressed record batch.

    Arrow allocates as much as a compressed buffer claims to hold before it looks at it. Fields by their number in Arrow's
    Message.fbs: `Message.header_type` 1, `Message.header` 2; `RecordBatch.compression` 3.
    """

    def field(table: int, number: int) -> int | None:
        vtable = table - int(struct.unpack_from("<i", header, table)[0])
        size = int(struct.unpack_from("<H", header, vtable)[0])
        offset = int(struct.unpack_from("<H", header, vtable + 4 + 2 * number)[0]) if 4 + 2 * number < size else 0
        return table + offset if offset else None

    try:
        message = int(struct.unpack_from("<I", header)[0])
        kind, batch = field(message, 1), field(message, 2)
        if kind is None or batch is None or header[kind] != _RECORD_BATCH:
            return True
        return field(batch + int(struct.unpack_from("<I", header, batch)[0]), 3) is not None
    except (struct.error, IndexError):
        return True


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
