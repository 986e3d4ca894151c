"""Sources: of which files documents and images are read, in which order, and where these may be cut into units."""

import csv
import glob
import hashlib
import os
import platform
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from data.compression import COMPRESSED_RATIO, SUFFIXES, is_compressed
from data.config import GivenSource, SourceAddress

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff"})
# Not the library itself: tests, installed packages, caches.
STDLIB_EXCLUDED = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})
DOCUMENT_BYTES = 4096

# How a unit is read: whole files of text; one text cut at line ends; lines of JSON; row groups; images with labels; shards of
# a `datasets` stream; the built-in digits.
Form = Literal["texts", "lines", "jsonl", "parquet", "images", "hub", "digits"]


class SourceFile(NamedTuple):
    """A file of a source: its size and time when the source was looked at, and an image's class."""

    path: str
    size: int
    stamp: int
    label: int | None = None


class Piece(NamedTuple):
    """The least that a unit may take: places [start, stop) of a file, and the bytes of input they stand for (None: unknown).

    Places are bytes of lines, row groups of Parquet, shards of a stream; of other files 0 is the whole.
    """

    file: int
    start: int
    stop: int
    weight: int | None


@dataclass(frozen=True)
class Source:
    """What is known of a source before it is read. `class_names`: None for text, () for images that have only numbers."""

    given: GivenSource
    form: Form
    description: str
    files: tuple[SourceFile, ...]
    state: str = ""
    class_names: tuple[str, ...] | None = None
    # Weights of the parts within each file, where files are cut at parts.
    parts: tuple[tuple[int | None, ...], ...] = ()

    def pieces(self, unit_bytes: int) -> Iterator[Piece]:
        """The source in order, in pieces; a file of lines is cut at every multiple of `unit_bytes`."""
        for number, file in enumerate(self.files):
            if self.parts:
                for part, weight in enumerate(self.parts[number]):
                    yield Piece(number, part, part + 1, weight)
            elif is_compressed(file.path):
                yield Piece(number, 0, 1, file.size * COMPRESSED_RATIO)
            elif self.form in ("lines", "jsonl"):
                for start in range(0, file.size, unit_bytes):
                    stop = min(start + unit_bytes, file.size)
                    yield Piece(number, start, stop, stop - start)
            else:
                yield Piece(number, 0, 1, file.size)


def open_source(given: GivenSource) -> Source:
    """Look at a source; a ValueError of one line names what is missing."""
    address = given.address
    if address.kind == "digits":
        return Source(given, "digits", "scikit-learn's 8x8 digits", (SourceFile("", 0, 0),), class_names=_DIGITS)
    if address.kind == "hf":
        # `datasets` takes a second to import: only those wait who use it.
        from data.hub import open_hugging_face

        return open_hugging_face(given)
    if address.kind == "csv":
        return _csv_images(given)
    files = source_files(address)
    if address.kind == "images":
        return _image_folder(given, files)
    found = tuple(_look_at(path, 0 if address.kind == "stdlib" else None) for path in files)
    if address.kind == "stdlib":
        version = platform.python_version()
        return Source(given, "texts", f"the standard library of Python {version}, {len(files)} files", found, version)
    description = f"{len(files)} files"
    if address.kind == "text" and Path(address.location).expanduser().is_file():
        description = f"one file, cut at line ends into documents of {DOCUMENT_BYTES:,} bytes or little more"
        return Source(given, "lines", description, found)
    if address.kind == "text":
        return Source(given, "texts", description, found)
    if address.kind == "jsonl":
        return Source(given, "jsonl", description, found)
    from data.source_reading import row_group_bytes

    assert address.column is not None
    parts = tuple(row_group_bytes(path, address.column) for path in files)
    return Source(given, "parquet", description, found, parts=parts)


def common_class_names(sources: Iterable[Source]) -> tuple[str, ...] | None:
    """The classes of a dataset of images: those of every source, or of all folders and tables together, sorted.

    None for text, () where the images have only numbers. ValueError where sources name their classes differently, or where
    text and images are mixed.
    """
    every = list(sources)
    distinct = {source.class_names for source in every}
    if len(distinct) == 1:
        return distinct.pop()
    given = ", ".join(source.given.given for source in every)
    if None in distinct:
        raise ValueError(f"data.source={given} mixes text and images; give each its own dataset")
    if any(source.form != "images" for source in every):
        raise ValueError(
            f"data.source={given}: the sources number their classes differently; give each its own dataset"
        )
    return sorted_names({name for source in every for name in source.class_names or ()})


def sorted_names(names: Iterable[str]) -> tuple[str, ...]:
    """Names of classes in their order: as numbers where all are, else as text."""
    distinct = set(names)
    numbers = all(name.isascii() and name.isdigit() for name in distinct)
    return tuple(sorted(distinct, key=lambda name: (int(name), name) if numbers else (0, name)))


def source_state(address: SourceAddress) -> str:
    """A hash that changes when a local source's files do (names, sizes, times); of the address alone elsewhere."""
    state = hashlib.sha256()
    if address.kind == "stdlib":
        state.update(platform.python_version().encode())
    for path in source_files(address):
        file = _look_at(path, 0 if address.kind == "stdlib" else None)
        state.update(f"{file.path}\0{file.size}\0{file.stamp}\n".encode(errors="surrogateescape"))
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
        return _files_of_classes(location)
    if address.kind == "csv":
        return [location, *(path for path, _ in _csv_rows(address))]
    if location.is_dir():
        suffix = {"text": "", "jsonl": ".jsonl", "parquet": ".parquet"}[address.kind]
        endings = tuple(suffix + compressed for compressed in ("", *SUFFIXES))
        files = [path for path in _walk(location) if path.name.endswith(endings)]
    elif location.is_file():
        files = [location]
    else:
        found = sorted(Path(name) for name in glob.glob(str(location), recursive=True))
        files = [path for path in found if path.is_file() or _leads_nowhere(path)]
    if not files:
        raise ValueError(f"source {location}: no such file, directory or pattern with files; correct data.source")
    return files


def _look_at(path: Path, stamp: int | None = None, label: int | None = None) -> SourceFile:
    try:
        status = path.stat()
    except OSError as error:
        raise ValueError(f"source {path}: cannot be read ({error.strerror}); correct data.source") from None
    return SourceFile(str(path), status.st_size, status.st_mtime_ns if stamp is None else stamp, label)


def _files_of_classes(root: Path) -> list[Path]:
    if not root.is_dir():
        raise ValueError(f"source {root}: there is no such directory; correct data.source")
    files = _walk(root)
    for path in files:
        if path.parent == root and path.suffix.lower() in IMAGE_SUFFIXES:
            raise ValueError(f"source {path}: an image of no class; move it into a sub-folder, which names its class")
    return [path for path in files if path.parent != root]


def _walk(root: Path) -> list[Path]:
    """All files below a directory but hidden ones, sorted by relative path. Links are followed; ValueError for one that leads
    nowhere, or back to a directory that it lies in, and for a directory that cannot be read."""
    files: list[str] = []
    ahead: list[tuple[str, tuple[str, ...]]] = [("", ())]  # directories, each with those that it lies in
    while ahead:
        below, above = ahead.pop()
        directory = root / below
        real = os.path.realpath(directory)
        if real in above:
            raise ValueError(f"source {directory}: a link to a directory that it lies in; remove it")
        try:
            found = list(os.scandir(directory))
        except OSError as error:
            raise ValueError(f"source {directory}: cannot be read ({error.strerror}); correct data.source") from None
        for entry in found:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                ahead.append((f"{below}{entry.name}/", (*above, real)))
            elif entry.is_file() or _leads_nowhere(Path(entry.path)):
                files.append(below + entry.name)
    return [root / name for name in sorted(files)]


def _leads_nowhere(path: Path) -> bool:
    """False, or a ValueError: what a link to nothing stood for must not be left out unseen."""
    if path.is_symlink() and not path.exists():
        raise ValueError(
            f"source {path}: a link that leads nowhere ({os.readlink(path)}); restore what it names or remove it"
        )
    return False


def _stdlib_files() -> list[Path]:
    root = Path(sysconfig.get_paths()["stdlib"])
    files: list[Path] = []
    for directory, folders, names in os.walk(root):
        folders[:] = [folder for folder in folders if folder not in STDLIB_EXCLUDED]  # not walked at all
        files += [Path(directory, name) for name in names if name.endswith(".py")]
    if not files:
        raise ValueError(f"source stdlib: no .py files in {root}; choose another data.source, such as text:PATH")
    return sorted(files, key=lambda path: path.relative_to(root).as_posix())


def _image_folder(given: GivenSource, files: list[Path]) -> Source:
    root = Path(given.address.location).expanduser()
    if not files:
        raise ValueError(f"source {root}: no images in sub-folders; each class is a sub-folder with its images")
    for path in files:
        if path.suffix.lower() not in IMAGE_SUFFIXES:
            raise ValueError(f"source {path}: not an image ({', '.join(sorted(IMAGE_SUFFIXES))}); move it elsewhere")
    named = [(path, path.relative_to(root).parts[0]) for path in files]
    return _labelled(given, named, tuple(sorted({name for _, name in named})), "folders")


def _csv_images(given: GivenSource) -> Source:
    named = list(_csv_rows(given.address))
    if not named:
        raise ValueError(f"source {given.address.location}: no rows; correct data.source")
    return _labelled(given, named, sorted_names(name for _, name in named), "classes")


def _labelled(given: GivenSource, named: list[tuple[Path, str]], class_names: tuple[str, ...], what: str) -> Source:
    labels = {name: number for number, name in enumerate(class_names)}
    files = tuple(_look_at(path, label=labels[name]) for path, name in named)
    return Source(given, "images", f"{len(files)} images in {len(class_names)} {what}", files, class_names=class_names)


def _csv_rows(address: SourceAddress) -> Iterator[tuple[Path, str]]:
    """The image and the class of every row; images lie beside the table or below."""
    table = Path(address.location).expanduser()
    columns = (address.column, address.label_column)
    assert None not in columns
    try:
        with table.open(encoding="utf-8-sig", newline="") as lines:
            rows = csv.DictReader(lines, strict=True)
            names = list(rows.fieldnames or [])
            for column in columns:
                if names.count(str(column)) != 1:
                    what = "several columns" if column in names else "no column"
                    raise ValueError(f"source {table}: {what} {column!r}; its columns are {names}")
            seen: dict[str, tuple[int, str]] = {}
            for row in rows:
                image, label = (row[str(column)] for column in columns)
                where = f"source {table}:{rows.line_num}"
                if not image or not label:
                    raise ValueError(f"{where}: no image or no label; complete the row")
                if None in row:
                    raise ValueError(f"{where}: more fields than the {len(names)} columns; correct the row")
                real = _image_below(table.parent, image, where)
                before = seen.setdefault(real, (rows.line_num, label))
                if before[0] != rows.line_num:
                    other = "" if before[1] == label else f" as {before[1]!r}, here as {label!r}"
                    raise ValueError(f"{where}: {image!r} is listed in line {before[0]} too{other}; remove one of them")
                yield table.parent / image, label
    except OSError as error:
        raise ValueError(f"source {table}: cannot be read ({error.strerror}); correct data.source") from None
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"source {table}: not a CSV file in UTF-8 ({error}); correct or convert it") from None


def _image_below(directory: Path, image: str, where: str) -> str:
    """Where an image that a table names really lies; a ValueError unless that is in the table's directory or below."""
    if "\0" in image:
        raise ValueError(f"{where}: {image!r} is no name of a file; correct the row")
    real = os.path.realpath(directory / image)
    if not real.startswith(os.path.realpath(directory).rstrip(os.sep) + os.sep):
        raise ValueError(f"{where}: {image!r} leaves the table's directory; move the image there")
    return real


_DIGITS = tuple(str(digit) for digit in range(10))
