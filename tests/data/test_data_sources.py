"""Every source, read for real from small local files, and what each says of a file that is not what it should be."""

import bz2
import gzip
import io
import lzma
import os
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from data import units
from data.config import DataConfig, parse_given
from data.dataset import open_dataset
from data.image_dataset import ImageDataset
from data.prepare import prepare
from data.shards import CheckedFile
from data.source_reading import Document, lines_of, read_unit
from data.sources import open_source
from data.store import LocalStore, read_manifest
from data.tokenizers import load_tokenizer
from data.units import input_of, plan_units
from tests.data.data_helpers import lorem, write_images, write_jsonl

TEXTS = [lorem(number) for number in range(40)]


def stored_texts(directory: Path, only: str | None = None) -> list[str]:
    """The documents of a prepared dataset, or of one split, from the shards and their ends, as any other tool could."""
    tokenizer, manifest = load_tokenizer(LocalStore(directory)), read_manifest(LocalStore(directory))
    texts = []
    for name, split in manifest.splits.items():
        for shard in split.shards if only in (None, name) else ():
            assert shard.docs is not None
            tokens = np.fromfile(directory / shard.data.name, dtype=manifest.dtype)
            start = 0
            for end in np.fromfile(directory / shard.docs.name, dtype="<u8").tolist():
                assert tokens[end - 1] == tokenizer.end_of_document
                texts.append(tokenizer.decode(tokens[start:end].tolist()))
                start = end
            assert start == len(tokens) == shard.tokens
    return texts


def prepared(tmp_path: Path, source: str | tuple[str, ...], **changes: object) -> Path:
    values: dict[str, object] = {"source": source, "directory": tmp_path / "prepared", "validation_fraction": 0.25}
    return prepare(DataConfig.model_validate(values | changes))


def write_parquet(path: Path, texts: list[str]) -> Path:
    pq.write_table(pa.table({"body": texts, "number": list(range(len(texts)))}), path, row_group_size=7)
    return path


def damage_second_group(path: Path) -> Path:
    """Overwrite the pages of the second row group's first column; the file's end, where everything is listed, stays whole."""
    column = pq.ParquetFile(path).metadata.row_group(1).column(0)
    start = column.dictionary_page_offset or column.data_page_offset
    content = bytearray(path.read_bytes())
    content[start : start + column.total_compressed_size] = b"\xff" * column.total_compressed_size
    path.write_bytes(content)
    return path


def test_text_from_a_folder_a_pattern_and_a_file(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    for number, text in enumerate(TEXTS):
        path = folder / f"part{number % 3}" / f"{number:02d}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (folder / "part0" / "empty.txt").touch()
    (folder / ".hidden").write_bytes(b"\xff")
    directory = prepared(tmp_path, f"text:{folder}")
    assert sorted(stored_texts(directory)) == sorted(TEXTS)
    assert read_manifest(LocalStore(directory)).sources[0].description == "41 files"
    by_pattern = prepared(tmp_path, f"text:{folder}/*/*.txt", directory=tmp_path / "by-pattern")
    assert sorted(stored_texts(by_pattern)) == sorted(TEXTS)
    with pytest.raises(ValueError, match=r"no documents for .* with data.validation_fraction 0\.25"):
        prepared(tmp_path, f"text:{folder}/part0/00.txt", directory=tmp_path / "one-file")


def test_links_are_followed_and_what_they_leave_out_is_refused(tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "texts", tmp_path / "elsewhere"
    for place, texts in ((folder, TEXTS[:20]), (elsewhere / "deep", TEXTS[20:])):
        place.mkdir(parents=True)
        for number, text in enumerate(texts):
            (place / f"{number:02d}.txt").write_text(text)
    (folder / "more").symlink_to(elsewhere)
    (folder / "again.txt").symlink_to(folder / "00.txt")
    source = f"text:{folder}"
    assert sorted(stored_texts(prepared(tmp_path, source))) == sorted([*TEXTS, TEXTS[0]])
    for link, target, message in (
        (elsewhere / "deep" / "back", folder, r"more/deep/back: a link to a directory that it lies in; remove it"),
        (folder / "gone.txt", tmp_path / "nothing", r"gone\.txt: a link that leads nowhere \(.*nothing\)"),
    ):
        link.symlink_to(target)
        for address in (source, f"text:{folder}/**"):
            if address == source or not target.exists():
                with pytest.raises(ValueError, match=message):
                    prepared(tmp_path, address, directory=tmp_path / "refused")
        link.unlink()
    (folder / ".hidden").symlink_to(tmp_path / "nothing")
    assert len(stored_texts(prepared(tmp_path, source, directory=tmp_path / "hidden"))) == 41


def test_one_large_file_is_cut_at_line_ends_so_that_a_part_can_be_held_out(tmp_path: Path) -> None:
    text = "\r\n".join(lorem(number) for number in range(400)) + "\nthe end, Grüße"
    (tmp_path / "input.txt").write_bytes(text.encode())
    source = f"text:{tmp_path}/input.txt"
    directory = prepared(tmp_path, source)
    parts = sorted(stored_texts(directory), key=text.index)
    assert "".join(parts) == text
    assert all(part.endswith("\n") and len(part) >= 4096 for part in parts[:-1])
    assert all(split.documents > 1 for split in read_manifest(LocalStore(directory)).splits.values())


def test_line_ends_and_unicode_are_kept(tmp_path: Path) -> None:
    texts = ["a\r\nb\rc\n", "Grüße, 世界 🌍", "\ufeffmark", "x\0y"]
    for number, text in enumerate(texts * 4):
        (tmp_path / f"{number:02d}.txt").write_bytes((text + str(number)).encode())
    directory = prepared(tmp_path, f"text:{tmp_path}/*.txt", validation_fraction=0.5)
    assert sorted(stored_texts(directory)) == sorted(text + str(number) for number, text in enumerate(texts * 4))


@pytest.mark.parametrize("compressed", [False, True])
def test_a_byte_order_mark_before_jsonl_is_none_of_its_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compressed: bool
) -> None:
    monkeypatch.setattr(units, "UNIT_BYTES", 500)
    folder = tmp_path / "texts"
    folder.mkdir()
    for name, texts in (("a", TEXTS[:20]), ("b", TEXTS[20:])):
        path = write_jsonl(folder / f"{name}.jsonl", texts)
        marked = b"\xef\xbb\xbf" + path.read_bytes()
        path.unlink()
        Path(f"{path}.gz" if compressed else path).write_bytes(gzip.compress(marked) if compressed else marked)
    (folder / "c.jsonl").write_bytes(b"\xef\xbb\xbf")
    assert sorted(stored_texts(prepared(tmp_path, f"jsonl:{folder}#text"))) == sorted(TEXTS)
    (folder / "d.jsonl").write_bytes(b'{"text": "x"}\n\xef\xbb\xbf{"text": "y"}\n')
    with pytest.raises(ValueError, match=r"d\.jsonl:2: not JSON"):
        prepared(tmp_path, f"jsonl:{folder}#text", directory=tmp_path / "other")


def test_jsonl_and_parquet(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "corpus.jsonl", TEXTS)
    assert sorted(stored_texts(prepared(tmp_path, f"jsonl:{source}#text"))) == sorted(TEXTS)
    folder = tmp_path / "tables"
    folder.mkdir()
    write_parquet(folder / "a.parquet", TEXTS[:25])
    write_parquet(folder / "b.parquet", TEXTS[25:])
    directory = prepared(tmp_path, f"parquet:{folder}#body", directory=tmp_path / "from-parquet")
    assert sorted(stored_texts(directory)) == sorted(TEXTS)


COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda content: pa.Codec("zstd").compress(content).to_pybytes(),
}


@pytest.mark.parametrize("suffix", COMPRESS)
def test_compressed_files(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(units, "UNIT_BYTES", 1000)
    compress = COMPRESS[suffix]
    lines = write_jsonl(tmp_path / "plain.jsonl", TEXTS[:20])
    folder = tmp_path / "lines"
    folder.mkdir()
    (folder / f"a.jsonl{suffix}").write_bytes(compress(lines.read_bytes()))
    (folder / "b.jsonl").write_bytes(write_jsonl(tmp_path / "more.jsonl", TEXTS[20:]).read_bytes())
    directory = prepared(tmp_path, f"train=jsonl:{folder}#text", validation_fraction=0.05)
    assert stored_texts(directory) == TEXTS
    # Two frames, one after the other, as tools that compress in parallel write them.
    whole = "".join(TEXTS * 5)
    half = len(whole) // 2
    (tmp_path / f"book.txt{suffix}").write_bytes(compress(whole[:half].encode()) + compress(whole[half:].encode()))
    text = prepared(
        tmp_path, f"train=text:{tmp_path}/book.txt{suffix}", validation_fraction=0.05, directory=tmp_path / "text"
    )
    assert "".join(stored_texts(text)) == whole
    assert len(stored_texts(text)) > 4
    content = (folder / f"a.jsonl{suffix}").read_bytes()
    for damaged in (content[: len(content) // 2], b"nothing of the kind" * 10):
        (folder / f"a.jsonl{suffix}").write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"a\.jsonl\{suffix}: not a whole \{suffix} file") as refused:
            prepared(tmp_path, f"jsonl:{folder}#text", directory=tmp_path / "damaged")
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize("unit_bytes", [1, 50, 300, 1000, 10**6])
def test_documents_do_not_depend_on_where_units_end(
    tmp_path: Path, unit_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(units, "UNIT_BYTES", unit_bytes)
    texts = TEXTS[:12]
    folder = tmp_path / "lines"
    folder.mkdir()
    write_jsonl(folder / "a.jsonl", texts[:5])
    (folder / "b.jsonl").write_bytes(b"")
    write_jsonl(folder / "c.jsonl", texts[5:])
    (folder / "c.jsonl").write_bytes((folder / "c.jsonl").read_bytes().removesuffix(b"\n"))
    write_parquet(tmp_path / "table.parquet", texts)
    (tmp_path / "texts").mkdir()
    for number, text in enumerate(texts):
        (tmp_path / "texts" / f"{number:02d}.txt").write_text(text)
    for source in (f"jsonl:{folder}#text", f"parquet:{tmp_path}/table.parquet#body", f"text:{tmp_path}/texts"):
        found = [open_source(parse_given(f"train={source}"))]
        cut = plan_units(found)
        documents = [
            document.text
            for unit in cut
            for document in read_unit(input_of(unit, found, None))
            if isinstance(document, Document)
        ]
        assert documents == texts
        assert len(cut) > 1 or unit_bytes >= 1000


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lines=st.lists(st.binary(max_size=30).map(lambda line: line.replace(b"\n", b"")), max_size=25),
    ended=st.booleans(),
    unit_bytes=st.integers(1, 90),
)
def test_a_line_belongs_to_the_unit_in_which_it_begins(
    tmp_path: Path, lines: list[bytes], ended: bool, unit_bytes: int
) -> None:
    path = tmp_path / "lines.txt"
    content = b"\n".join(lines) + (b"\n" if ended else b"")
    path.write_bytes(content)
    read = []
    for start in range(0, len(content), unit_bytes):
        stop = min(start + unit_bytes, len(content))
        for position, line in lines_of(path, start, stop):
            assert start <= position < stop
            read.append(line)
    assert read == content.splitlines(keepends=True) or b"".join(read) == content
    assert all(line.endswith(b"\n") for line in read[:-1])
    assert b"".join(read) == content


def test_of_a_long_line_only_the_unit_in_which_it_begins_reads_more_than_itself(tmp_path: Path) -> None:
    path, size, unit_bytes = tmp_path / "line.txt", 40_000_000, 1 << 16
    path.write_bytes(b"x" * size + b"\nlast")
    tracemalloc.start()
    try:
        for start in (unit_bytes, size // 2):
            assert list(lines_of(path, start, start + unit_bytes)) == []
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()
    assert list(lines_of(path, size - 10, size + 5)) == [(size + 1, b"last")]


def test_sources_side_by_side_and_whole_splits(tmp_path: Path) -> None:
    first, second = (
        write_jsonl(tmp_path / f"{name}.jsonl", texts) for name, texts in (("a", TEXTS[:25]), ("b", TEXTS[25:]))
    )
    given = [f"jsonl:{first}#text", f"jsonl:{second}#text"]
    directory = prepared(tmp_path, tuple(given))
    assert sorted(stored_texts(directory)) == sorted(TEXTS)
    manifest = read_manifest(LocalStore(directory))
    assert [source.address for source in manifest.sources] == given
    splits = (f"train={given[0]}", f"my-test={given[1]}")
    whole = prepared(tmp_path, splits, directory=tmp_path / "whole", validation_fraction=0.05)
    assert stored_texts(whole, "train") == TEXTS[:25]
    assert stored_texts(whole, "my-test") == TEXTS[25:]
    assert read_manifest(LocalStore(whole)).validation_fraction is None
    with pytest.raises(
        ValueError, match=r"no split 'validation', only my-test, train; prepare it with .*validation=ADDRESS"
    ):
        open_dataset(LocalStore(whole), DataConfig(), "validation")
    mixed = prepared(tmp_path, (given[0], f"test={given[1]}"), directory=tmp_path / "mixed")
    assert set(read_manifest(LocalStore(mixed)).splits) == {"train", "validation", "test"}
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(ValueError, match=r"no documents for test; correct data\.source"):
        prepared(tmp_path, (given[0], f"test=jsonl:{tmp_path}/empty.jsonl#text"), directory=tmp_path / "without")


def test_one_dataset_is_of_one_kind(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="text and images cannot be mixed"):
        DataConfig(source=("stdlib", "digits"))
    with pytest.raises(ValueError, match="validation_fraction means nothing"):
        DataConfig(source="train=stdlib", validation_fraction=0.2)
    with pytest.raises(ValueError, match="number their classes differently"):
        prepared(tmp_path, ("digits", f"images:{write_images(tmp_path / 'photos')}"))


def write_table(path: Path, rows: list[str], header: str = "file,kind") -> Path:
    path.write_text("\n".join([header, *rows]) + "\n")
    return path


def test_images_listed_in_a_csv_file(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "photos", count=30)
    names = sorted(path.relative_to(tmp_path).as_posix() for path in folder.glob("*/*"))
    rows = [f"{name},{number % 12}" for number, name in enumerate(names)]
    table = write_table(tmp_path / "labels.csv", rows)
    directory = prepared(tmp_path, f"train=csv:{table}#file,kind", validation_fraction=0.05)
    dataset = open_dataset(LocalStore(directory), DataConfig(), "train")
    assert dataset.facts.class_names == tuple(str(number) for number in range(12))  # as numbers, not 0, 1, 10, 11, 2
    assert isinstance(dataset, ImageDataset)
    fields, _ = dataset.gather(np.arange(30))
    assert fields["labels"].tolist() == [number % 12 for number in range(30)]
    pixels = np.asarray(Image.open(tmp_path / names[7])).transpose(2, 0, 1)
    assert (fields["images"][7] == pixels).all()


def test_classes_of_several_tables_are_numbered_together(tmp_path: Path) -> None:
    write_images(tmp_path / "photos", count=6)
    names = sorted(path.relative_to(tmp_path).as_posix() for path in (tmp_path / "photos").glob("*/*"))
    first = write_table(tmp_path / "a.csv", [f"{name},owl" for name in names[:3]])
    second = write_table(tmp_path / "b.csv", [f"{name},ant" for name in names[3:]])
    sources = (f"train=csv:{first}#file,kind", f"validation=csv:{second}#file,kind")
    directory = prepared(tmp_path, sources, validation_fraction=0.05)
    for split, label in (("train", 1), ("validation", 0)):
        dataset = open_dataset(LocalStore(directory), DataConfig(), split)
        assert dataset.facts.class_names == ("ant", "owl")
        assert dataset.gather(np.arange(3))[0]["labels"].tolist() == [label] * 3


def test_a_csv_file_never_leads_out_of_its_directory(tmp_path: Path) -> None:
    inside = tmp_path / "inside"
    write_images(inside, count=4)
    write_images(tmp_path / "inside-too", count=4)
    (inside / "link").symlink_to(tmp_path / "inside-too")
    for path in (
        "../inside-too/cat/000.jpg",
        str(tmp_path / "inside-too/cat/000.jpg"),
        "link/cat/000.jpg",
        "cat/../../x",
    ):
        table = write_table(inside / "labels.csv", ["cat/000.jpg,a", f"{path},b"])
        with pytest.raises(ValueError, match=r"labels\.csv:3: .* leaves the table's directory") as refused:
            prepared(tmp_path, f"csv:{table}#file,kind")
        assert "\n" not in str(refused.value)
    for rows, message in (
        (["cat/000.jpg,"], "no image or no label"),
        (["cat/none.jpg,a"], "cannot be read"),
        (["cat/000.jpg"], "no image or no label"),
        ([], "no rows"),
        (['"cat'], "not a CSV file"),
        (["cat/000.jpg,a", "cat/0\000.jpg,b"], r"labels\.csv:3: 'cat/0\\x00\.jpg' is no name of a file"),
        (["cat/000.jpg,a,b"], r"labels\.csv:2: more fields than the 2 columns"),
        (
            ["cat/000.jpg,a", "cat/./000.jpg,b"],
            r"labels\.csv:3: .* is listed in line 2 too as 'a', here as 'b'; remove",
        ),
        (["cat/000.jpg,a", "cat/000.jpg,a"], r"labels\.csv:3: .* is listed in line 2 too; remove one"),
    ):
        table = write_table(inside / "labels.csv", rows)
        with pytest.raises(ValueError, match=message) as refused:
            prepared(tmp_path, f"csv:{table}#file,kind")
        assert "\n" not in str(refused.value)
    twice = write_table(inside / "twice.csv", ["cat/000.jpg,a,b"], header="file,kind,kind")
    with pytest.raises(ValueError, match=r"several columns 'kind'; its columns are \['file', 'kind', 'kind'\]"):
        prepared(tmp_path, f"csv:{twice}#file,kind")
    with pytest.raises(ValueError, match=r"no column 'label'; its columns are \['file', 'kind'\]"):
        prepared(tmp_path, f"csv:{table}#file,label")


def test_the_standard_library_is_there_without_tests(tmp_path: Path) -> None:
    directory = prepared(tmp_path, "stdlib", shard_bytes=4_000_000, validation_fraction=0.05)
    manifest = read_manifest(LocalStore(directory))
    documents = sum(split.documents for split in manifest.splits.values())
    assert 300 < documents < 2000
    assert 0.01 < manifest.splits["validation"].documents / documents < 0.12
    assert len(manifest.splits["train"].shards) > 2
    assert "standard library of Python 3" in manifest.sources[0].description


def test_digits_are_pngs_of_eight_by_eight(tmp_path: Path) -> None:
    config = DataConfig(source="digits", directory=tmp_path / "digits", validation_fraction=0.2)
    directory = prepare(config)
    train, held_out = (open_dataset(LocalStore(directory), config, split) for split in ("train", "validation"))
    assert train.samples + held_out.samples == 1797
    assert 250 < held_out.samples < 470
    fields, hashes = train.gather(np.arange(train.samples))
    assert fields["images"].shape == (train.samples, 1, 8, 8)
    assert (fields["images"].min(), fields["images"].max()) == (0, 255)
    assert np.bincount(fields["labels"]).min() > 100
    assert train.facts.class_names == tuple("0123456789")
    assert len(np.unique(hashes)) == train.samples


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_image_folders_keep_their_bytes_and_classes(tmp_path: Path, mode: str) -> None:
    source = write_images(tmp_path / "photos", count=600, mode=mode)
    (source / "LICENSE").write_text("not in a class")
    directory = prepared(tmp_path, f"images:{source}", shard_bytes=60_000)
    seen = {}
    for split in ("train", "validation"):
        dataset = open_dataset(LocalStore(directory), DataConfig(), split)  # type: ignore[arg-type]
        assert isinstance(dataset, ImageDataset)
        assert dataset.facts.class_names == ("cat", "dog")
        assert (dataset.facts.channels, dataset.facts.image_size_pixels) == (len(mode), 12)
        fields, _ = dataset.gather(np.arange(dataset.samples))
        for image, label in zip(fields["images"], fields["labels"], strict=True):
            seen[image.tobytes()] = int(label)
    for path in source.glob("*/*"):
        pixels = np.atleast_3d(np.asarray(Image.open(path))).transpose(2, 0, 1)
        assert seen.pop(pixels.tobytes()) == int(path.parent.name == "dog")
    assert seen == {}


def test_images_of_many_shapes_need_a_size_and_are_resized_to_it(tmp_path: Path) -> None:
    source = write_images(tmp_path / "photos", count=16, size=(10, 6))
    directory = prepared(tmp_path, f"images:{source}")
    with pytest.raises(ValueError, match=r"set data\.image_size_pixels"):
        open_dataset(LocalStore(directory), DataConfig(), "train")
    config = DataConfig(source=f"images:{source}", image_size_pixels=5, image_channels=1)
    fields, _ = open_dataset(LocalStore(directory), config, "train").gather(np.array([3, 0, 3]))
    assert fields["images"].shape == (3, 1, 5, 5)
    assert np.array_equal(fields["images"][0], fields["images"][2])
    Image.new("L", (10, 6)).save(source / "cat" / "grey.png")
    mixed = prepared(tmp_path, f"images:{source}", directory=tmp_path / "mixed")
    with pytest.raises(ValueError, match=r"set data\.image_channels"):
        open_dataset(LocalStore(mixed), DataConfig(source=f"images:{source}", image_size_pixels=5), "train")


HUGGING_FACE = """
import sys
from pathlib import Path
from data.config import DataConfig
from data.prepare import prepare
for number, source in enumerate(sys.argv[2:]):
    try:
        prepare(DataConfig(source=source, directory=Path(sys.argv[1]) / str(number), validation_fraction=0.25))
        print("prepared")
    except ValueError as error:
        print(error)
"""


def hugging_face(root: Path, *sources: str) -> list[str]:
    """Prepare source k as `root/k` in a process that may not use the network, and return what it says of each."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(root / "hf")}
    command = [sys.executable, "-c", HUGGING_FACE, str(root), *sources]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout.splitlines()


def test_hugging_face_texts_from_local_folders(tmp_path: Path) -> None:
    tables, lines = tmp_path / "tables", tmp_path / "lines"
    tables.mkdir()
    lines.mkdir()
    write_parquet(tables / "train.parquet", TEXTS[:30])
    write_parquet(tables / "test.parquet", TEXTS[30:])
    write_jsonl(lines / "data.jsonl", TEXTS)
    said = hugging_face(
        tmp_path,
        f"hf:{tables}",
        f"hf:{tables}@test#body",
        f"hf:{lines}#text",
        f"hf:{tables}#nothing",
        f"hf:{tables}@no",
    )
    assert said[:3] == ["prepared"] * 3
    assert sorted(stored_texts(tmp_path / "0")) == sorted(TEXTS[:30])  # its only text column
    assert sorted(stored_texts(tmp_path / "1")) == sorted(TEXTS[30:])
    assert sorted(stored_texts(tmp_path / "2")) == sorted(TEXTS)
    assert "no column 'nothing'; its columns are ['body', 'number']" in said[3]
    assert "`datasets` cannot load split 'no'" in said[4]
    assert len(said) == 5


def test_a_damaged_file_of_a_hugging_face_source_is_told_in_a_line(tmp_path: Path) -> None:
    tables = tmp_path / "tables"
    tables.mkdir()
    damage_second_group(write_parquet(tables / "train.parquet", TEXTS))
    [said] = hugging_face(tmp_path, f"hf:{tables}#body")
    assert said.startswith(f"source hf:{tables}, shard 0: `datasets` cannot read on at row ")
    assert said.endswith("; replace what is damaged")


def test_hugging_face_streams_are_prepared_shard_by_shard(tmp_path: Path) -> None:
    tables = tmp_path / "tables"
    tables.mkdir()
    for number in range(4):
        write_parquet(tables / f"train-{number}.parquet", TEXTS[number * 10 : number * 10 + 10])
    write_parquet(tables / "test.parquet", ["held out, every word of it"])
    program = (
        HUGGING_FACE.replace("source=source,", "source=tuple(source.split(';')), shard_bytes=4000,")
        .replace(", validation_fraction=0.25", "")
        .replace("prepare(DataConfig", "prepare(workers=2, config=DataConfig")
    )
    sources = f"train=hf:{tables}#body;validation=hf:{tables}@test#body"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    command = [sys.executable, "-c", program, str(tmp_path), sources]
    said = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    assert said.splitlines() == ["prepared"], said
    manifest = read_manifest(LocalStore(tmp_path / "0"))
    assert stored_texts(tmp_path / "0", "train") == TEXTS  # in the order of the source
    assert stored_texts(tmp_path / "0", "validation") == ["held out, every word of it"]
    # Of unknown size, each shard of the stream is a group, and so has shards of its own.
    names = {shard.data.name[: len("train-00000")] for shard in manifest.splits["train"].shards}
    assert names == {f"train-{number:05d}" for number in range(4)}


def test_hugging_face_images_from_a_local_folder(tmp_path: Path) -> None:
    source = write_images(tmp_path / "photos", count=30)
    assert hugging_face(tmp_path, f"hf:{source}") == ["prepared"]
    dataset = open_dataset(LocalStore(tmp_path / "0"), DataConfig(), "train")
    assert dataset.facts.class_names == ("cat", "dog")
    assert read_manifest(LocalStore(tmp_path / "0")).splits["train"].documents == dataset.samples


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("text:{}/nothing", "no such file"),
        ("jsonl:{}/nothing#text", "no such file"),
        ("parquet:{}/nothing#text", "no such file"),
        ("images:{}/nothing", "no such directory"),
        ("images:{}/empty", "no images in sub-folders"),
        ("text:{}/empty", "no such file"),
        ("text:{}/latin.txt", "latin.txt: not UTF-8 at byte 3"),
        ("text:{}/blank.txt", "empty, there are no documents"),
        ("jsonl:{}/latin.txt#text", "latin.txt:1: not UTF-8"),
        ("jsonl:{}/broken.jsonl#text", "broken.jsonl:2: not JSON"),
        ("jsonl:{}/good.jsonl#other", "good.jsonl:1: no text under 'other'"),
        ("jsonl:{}/surrogate.jsonl#text", "half of a surrogate pair"),
        ("parquet:{}/latin.txt#text", "not a Parquet file"),
        ("parquet:{}/table.parquet#text", r"no column 'text'; its columns are \['body', 'number'\]"),
        ("parquet:{}/table.parquet#number", "row 0 of column 'number' is not text"),
        ("images:{}/broken", "cut.png: cannot be decoded"),
        ("images:{}/other", "notes.txt: not an image"),
        ("images:{}/loose", "loose/red.png: an image of no class; move it into a sub-folder"),
        ("jsonl:{}/long.jsonl#text", "long.jsonl:2: not JSON .*4300 digits"),
        ("parquet:{}/latin.parquet#body", r"latin\.parquet: row 8 of column 'body' is not UTF-8 at byte 3"),
        ("parquet:{}/damaged.parquet#body", r"damaged\.parquet: row group 1, from row 7 on, cannot be read \("),
        ("images:{}/deep", "do not fit in 8 bits"),
    ],
)
def test_bad_sources_are_named_in_one_line(tmp_path: Path, source: str, message: str) -> None:
    for folder in ("empty", "broken/a", "other/a", "deep/a"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "latin.txt").write_bytes(b"gru\xdf")
    (tmp_path / "blank.txt").touch()
    (tmp_path / "broken.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    (tmp_path / "surrogate.jsonl").write_text('{"text": "\\ud800"}\n')
    write_jsonl(tmp_path / "good.jsonl", TEXTS)
    write_parquet(tmp_path / "table.parquet", TEXTS)
    (tmp_path / "long.jsonl").write_text('{"text": "fine"}\n{"text": "x", "n": ' + "7" * 5000 + "}\n")
    latin = [text.encode() for text in TEXTS[:8]] + [b"gru\xdf"]
    pq.write_table(pa.table({"body": pa.array(latin).view(pa.string())}), tmp_path / "latin.parquet", row_group_size=7)
    damage_second_group(write_parquet(tmp_path / "damaged.parquet", TEXTS))
    buffer = io.BytesIO()
    Image.new("RGB", (30, 30), "red").save(buffer, format="PNG")
    (tmp_path / "loose" / "a").mkdir(parents=True)
    for name in ("red.png", "a/red.png"):
        (tmp_path / "loose" / name).write_bytes(buffer.getvalue())
    (tmp_path / "broken" / "a" / "cut.png").write_bytes(buffer.getvalue()[:60])
    (tmp_path / "other" / "a" / "notes.txt").write_text("hello")
    Image.new("I;16", (4, 4)).save(tmp_path / "deep" / "a" / "deep.png")
    with pytest.raises(ValueError, match=message) as refused:
        prepared(tmp_path, source.format(tmp_path))
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "prepared").exists()
    assert list(tmp_path.glob(".prepared*")) == []


def test_the_checked_file_maps_what_was_written(tmp_path: Path) -> None:
    directory = prepared(tmp_path, f"jsonl:{write_jsonl(tmp_path / 'corpus.jsonl', TEXTS)}#text")
    entry = read_manifest(LocalStore(directory)).splits["train"].shards[0].data
    file = CheckedFile(LocalStore(directory), entry)
    file.check_all()
    assert bytes(file.map) == (directory / entry.name).read_bytes()
