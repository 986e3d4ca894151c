"""Sources: where documents and images come from before they are prepared. Order and content are deterministic."""

import glob
import hashlib
import io
import json
import os
import platform
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from data.config import SourceAddress

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff"})
# Not the library itself: tests, installed packages, caches.
STDLIB_EXCLUDED = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})
DOCUMENT_CHARACTERS = 4096
_UNREADABLE = "source {}: cannot be read ({}); correct data.source or the file's permissions"


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
class TextSource:
    """Texts; `documents()` may be called again and yields the same ones. `size_bytes` is None where unknown."""

    description: str
    documents: Callable[[], Iterator[Document]]
    size_bytes: int | None


@dataclass(frozen=True)
class ImageSource:
    """Images; `class_names` is None where the source has only numbers, which are then the names."""

    description: str
    class_names: tuple[str, ...] | None
    images: Callable[[], Iterator[EncodedImage]]
    size_bytes: int | None


def open_source(address: SourceAddress) -> TextSource | ImageSource:
    """Open a source; a ValueError of one line names what is missing."""
    if address.kind == "digits":
        return _digits()
    if address.kind == "hf":
        # `datasets` takes a second to import: only those wait who use it.
        from data.hub import open_hugging_face

        return open_hugging_face(address)
    files = source_files(address)
    if address.kind == "images":
        return _image_folder(address, files)
    size_bytes = sum(path.stat().st_size for path in files)
    if address.kind == "stdlib":
        root = _stdlib_directory()
        description = f"the standard library of Python {platform.python_version()}, {len(files)} files"
        return TextSource(description, lambda: _read_texts(files, root), size_bytes)
    description = f"{len(files)} files"
    if address.kind == "text" and Path(address.location).expanduser().is_file():
        description = f"one file, cut at line ends into documents of {DOCUMENT_CHARACTERS:,} characters or little more"
        return TextSource(description, lambda: _cut_text(files[0]), size_bytes)
    if address.kind == "text":
        return TextSource(description, lambda: _read_texts(files, None), size_bytes)
    column = address.column
    assert column is not None
    if address.kind == "jsonl":
        return TextSource(description, lambda: _read_jsonl(files, column), size_bytes)
    return TextSource(description, lambda: _read_parquet(files, column), size_bytes)


def source_state(address: SourceAddress) -> str:
    """A hash that changes when a local source's files do (names, sizes, times); of the address alone elsewhere."""
    state = hashlib.sha256()
    if address.kind == "stdlib":
        state.update(platform.python_version().encode())
    for path in source_files(address):
        status = path.stat()
        stamp = 0 if address.kind == "stdlib" else status.st_mtime_ns
        state.update(f"{path}\0{status.st_size}\0{stamp}\n".encode(errors="surrogateescape"))
    return state.hexdigest()


def source_files(address: SourceAddress) -> list[Path]:
    """The files of a local source, sorted by relative path; empty for sources that are not files."""
    if address.kind == "digits":
        return []
    if address.kind == "stdlib":
        return _stdlib_files()
    location = Path(address.location).expanduser()
    if address.kind == "hf":
        return _walk(location) if location.is_dir() else []
    if address.kind == "images":
        if not location.is_dir():
            raise ValueError(f"source {location}: there is no such directory; correct data.source")
        return [path for path in _walk(location) if path.parent != location]
    if location.is_dir():
        suffix = {"text": "", "jsonl": ".jsonl", "parquet": ".parquet"}[address.kind]
        files = [path for path in _walk(location) if path.name.endswith(suffix)]
    elif location.is_file():
        files = [location]
    else:
        files = sorted(path for name in glob.glob(str(location), recursive=True) if (path := Path(name)).is_file())
    if not files:
        raise ValueError(f"source {location}: no such file, directory or pattern with files; correct data.source")
    return files


def _walk(root: Path) -> list[Path]:
    """All files below a directory but hidden ones, sorted by relative path."""
    files = [path for path in root.rglob("*") if path.is_file()]
    visible = [path for path in files if not any(part.startswith(".") for part in path.relative_to(root).parts)]
    return sorted(visible, key=lambda path: path.relative_to(root).as_posix())


def _stdlib_directory() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def _stdlib_files() -> list[Path]:
    root = _stdlib_directory()
    files: list[Path] = []
    for directory, folders, names in os.walk(root):
        folders[:] = [folder for folder in folders if folder not in STDLIB_EXCLUDED]  # not walked at all
        files += [Path(directory, name) for name in names if name.endswith(".py")]
    if not files:
        raise ValueError(f"source stdlib: no .py files in {root}; choose another data.source, such as text:PATH")
    return sorted(files, key=lambda path: path.relative_to(root).as_posix())


def _read_texts(files: list[Path], root: Path | None) -> Iterator[Document]:
    for path in files:
        where = str(path.relative_to(root)) if root else str(path)
        yield Document(_decode(_read(path), where), where)


def _cut_text(path: Path) -> Iterator[Document]:
    """The parts of a file that is all the text there is: as one document it could not be split for validation."""
    parts: list[str] = []
    size, first_line = 0, 1
    for number, line in enumerate(_decode(_read(path), str(path)).splitlines(keepends=True), start=1):
        parts.append(line)
        size += len(line)
        if size >= DOCUMENT_CHARACTERS:
            yield Document("".join(parts), f"{path}:{first_line}")
            parts, size, first_line = [], 0, number + 1
    if parts:
        yield Document("".join(parts), f"{path}:{first_line}")


def _read_jsonl(files: list[Path], field: str) -> Iterator[Document]:
    for path in files:
        for number, line in enumerate(_read_lines(path), start=1):
            where = f"{path}:{number}"
            if not line.strip():
                continue
            try:
                record = json.loads(_decode(line, where))
            except json.JSONDecodeError as error:
                raise ValueError(f"source {where}: not JSON ({error}); correct the line or remove it") from None
            if not isinstance(record, dict) or not isinstance(record.get(field), str):
                raise ValueError(f"source {where}: no text under {field!r}; correct the line or the field's name")
            yield Document(record[field], where)


def _read_lines(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb") as lines:
            yield from lines
    except OSError as error:
        raise ValueError(_UNREADABLE.format(path, error.strerror)) from None


def _read_parquet(files: list[Path], column: str) -> Iterator[Document]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    for path in files:
        try:
            table = pq.ParquetFile(path)
        except (pa.ArrowInvalid, OSError) as error:
            raise ValueError(f"source {path}: not a Parquet file ({' '.join(str(error).split())})") from None
        with table:
            if column not in table.schema_arrow.names:
                raise ValueError(f"source {path}: no column {column!r}; its columns are {table.schema_arrow.names}")
            row = 0
            for batch in table.iter_batches(batch_size=1024, columns=[column]):
                for text in batch.column(0).to_pylist():
                    if not isinstance(text, str):
                        raise ValueError(f"source {path}: row {row} of column {column!r} is not text but {text!r:.40}")
                    yield Document(text, f"{path}, row {row}")
                    row += 1


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(_UNREADABLE.format(path, error.strerror)) from None


def _decode(content: bytes, where: str) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"source {where}: not UTF-8 at byte {error.start}; convert the file or remove it") from None


def _image_folder(address: SourceAddress, files: list[Path]) -> ImageSource:
    root = Path(address.location).expanduser()
    if not files:
        raise ValueError(f"source {root}: no images in sub-folders; each class is a sub-folder with its images")
    for path in files:
        if path.suffix.lower() not in IMAGE_SUFFIXES:
            raise ValueError(f"source {path}: not an image ({', '.join(sorted(IMAGE_SUFFIXES))}); move it elsewhere")
    class_names = tuple(sorted({path.relative_to(root).parts[0] for path in files}))
    labels = {name: number for number, name in enumerate(class_names)}

    def images() -> Iterator[EncodedImage]:
        for path in files:
            yield EncodedImage(_read(path), labels[path.relative_to(root).parts[0]], str(path))

    description = f"{len(files)} images in {len(class_names)} folders"
    return ImageSource(description, class_names, images, sum(path.stat().st_size for path in files))


def _digits() -> ImageSource:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ValueError("source digits needs scikit-learn; install it with `pip install 'lockstep[digits]'`") from None
    bunch = load_digits()

    def images() -> Iterator[EncodedImage]:
        for number, (pixels, label) in enumerate(zip(bunch.images, bunch.target, strict=True)):
            buffer = io.BytesIO()
            # 17 levels of grey, 0 to 16, spread over 0 to 255.
            Image.fromarray((pixels * 255 / 16).round().astype("uint8")).save(buffer, format="PNG")
            yield EncodedImage(buffer.getvalue(), int(label), f"digit {number}")

    return ImageSource("scikit-learn's 8x8 digits", tuple(str(name) for name in bunch.target_names), images, None)
