"""Parts of a streamed source: each example once an epoch, and going on exactly where any sample ended."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import data.parts
from data.errors import CorruptData
from data.parts import Place
from data.streamed import StreamedSource
from tests.data.streamed_helpers import (
    KINDS,
    documents_in,
    documents_of,
    line,
    part_of,
    streamed_config,
    write_source,
)


@pytest.fixture(autouse=True)
def small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several groups in each part of a small source."""
    monkeypatch.setattr(data.parts, "GROUP_EXAMPLES", 5)


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("sources")
    return {kind: write_source(root / kind, kind) for kind in KINDS}


def samples_of_epochs(source: StreamedSource, documents: int, epochs: int) -> int:
    """Samples that surely hold so many documents of the test's sources so often, and some of the next epoch."""
    return epochs * documents * (1 if source.tokenizer is None else 4)


@pytest.mark.parametrize("parts", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_parts_together_hold_each_document_once_an_epoch(kind: str, parts: int, paths: dict[str, Path]) -> None:
    source = StreamedSource(streamed_config(paths[kind], kind))
    expected = documents_of(paths[kind], kind, "train")
    first: list[Any] = []
    for number in range(parts):
        part = part_of(source, number, parts)
        examples = source.read(source.part(number, parts), "train")
        own = len([found for found in examples if found is not None])
        fields, _ = part.take(samples_of_epochs(source, len(expected) // parts + 2, 3))
        given = documents_in(fields)
        assert len(given) > 2 * own  # the part went on into its next epochs, without a document between
        assert given[own : 2 * own] == given[:own]
        first += given[:own]
    assert Counter(first) == Counter(expected)
    if parts == 1 and kind != "images":
        assert first == expected


@pytest.mark.parametrize("parts", [1, 3])
def test_shuffled_documents_stay_among_their_neighbours_and_differ_each_epoch(
    parts: int, paths: dict[str, Path]
) -> None:
    expected = documents_of(paths["jsonl"], "jsonl", "train")
    plain = StreamedSource(streamed_config(paths["jsonl"], "jsonl"))
    source = StreamedSource(streamed_config(paths["jsonl"], "jsonl", shuffle_buffer_samples=8))
    union: list[str] = []
    for number in range(parts):
        examples = [found for found in plain.read(plain.part(number, parts), "train") if found is not None]
        order = [content.decode() for _, content in examples]
        given = documents_in(part_of(source, number, parts).take(samples_of_epochs(source, len(order), 3))[0])
        epochs = [given[: len(order)], given[len(order) : 2 * len(order)]]
        assert epochs[0] != epochs[1]
        for epoch in epochs:
            for start in range(0, len(order), 8):
                assert set(epoch[start : start + 8]) == set(order[start : start + 8])
            assert epoch != order
        union += epochs[0]
    assert Counter(union) == Counter(expected)


@pytest.mark.parametrize("shuffle", [0, 8])
@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_a_part_goes_on_exactly_from_every_place(kind: str, parts: int, shuffle: int, paths: dict[str, Path]) -> None:
    source = StreamedSource(streamed_config(paths[kind], kind, shuffle_buffer_samples=shuffle))
    field = "images" if kind == "images" else "tokens"
    part = part_of(source, parts - 1, parts)
    count = samples_of_epochs(source, len(documents_of(paths[kind], kind, "train")) // parts, 2)
    places, rows, hashes = [part.place], [], []
    for _ in range(count):
        fields, read = part.take(1)
        rows.append(fields[field][0])
        hashes.append(int(read[0]))
        places.append(part.place)
    assert {place.epoch for place in places} >= {0, 1}
    assert len({(place.epoch, place.group) for place in places}) > 3
    for start in range(0, count, 3):
        resumed = part_of(source, parts - 1, parts, stored(places[start]))
        end = min(start + 8, count)
        fields, read = resumed.take(end - start)
        assert read.tolist() == hashes[start:end]
        assert np.array_equal(fields[field], np.stack(rows[start:end]))
        assert unsourced(resumed.place) == unsourced(places[end])
    # Resumed from what a resumed part told, again and again: states of `datasets` 5.0 stopped to advance at the second time.
    place, start, read_in_all = Place(), 0, []
    while start < count:
        resumed = part_of(source, parts - 1, parts, stored(place))
        size = min(1 + start * 7 % 11, count - start)
        read_in_all += resumed.take(size)[1].tolist()
        place, start = resumed.place, start + size
        assert unsourced(place) == unsourced(places[start])
    assert read_in_all == hashes


def stored(place: Place) -> Place:
    """A place as a checkpoint gives it back."""
    return Place(**json.loads(json.dumps(place.as_json())))


def unsourced(place: Place) -> Place:
    """A place without the state of `datasets`, which may say the same in other words after a resume."""
    return replace(place, source=None)


def test_a_source_that_was_changed_is_noticed_where_a_run_goes_on(tmp_path: Path) -> None:
    config = streamed_config(write_source(tmp_path / "source", "jsonl"), "jsonl")
    part = part_of(StreamedSource(config), 0, 1)
    part.take(30)
    place = part.place
    assert place.group > 0
    for file in (tmp_path / "source").iterdir():
        file.write_text(file.read_text().replace("document", "changed"))
    with pytest.raises(CorruptData, match=r"part 0 of 1 cannot go on where it stopped \(epoch 0, example \d+\)"):
        part_of(StreamedSource(config), 0, 1, place).take(1)
    for file in sorted((tmp_path / "source").iterdir())[1:]:
        file.unlink()
    with pytest.raises(CorruptData, match="cannot go on where it stopped"):
        part_of(StreamedSource(config), 0, 1, place).take(1)


def test_a_part_without_documents_says_so_instead_of_spinning(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "a.jsonl").write_text("".join(json.dumps({"text": line(n)}) + "\n" for n in range(3)))
    source = StreamedSource(streamed_config(tmp_path / "source", "jsonl", validation_fraction=0.001))
    assert len(documents_in(part_of(source, 2, 3).take(9)[0])) > 1
    with pytest.raises(ValueError, match=r"part 3 of 4 holds no training documents; lower data.streaming_parts"):
        part_of(source, 3, 4).take(1)


def test_rows_that_hold_nothing_usable_are_named(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.jsonl").write_text('{"text": "one"}\n{"text": null}\n{"text": "two"}\n')
    source = StreamedSource(streamed_config(tmp_path / "texts", "jsonl", validation_fraction=0.001))
    with pytest.raises(CorruptData, match="row 1: column 'text' is not text but None"):
        part_of(source, 0, 1).take(1)
    torn = write_source(tmp_path / "tables", "parquet", shards=1)
    source = StreamedSource(streamed_config(torn, "parquet"))
    (torn / "0.parquet").write_bytes(b"PAR1 and nothing more PAR1")
    with pytest.raises(CorruptData, match=r"^source hf:.*/tables: \S.*$"):
        part_of(source, 0, 1).take(1)
    broken = write_source(tmp_path / "images", "images")
    for file in broken.rglob("*.png"):
        file.write_bytes(file.read_bytes()[:45])
    source = StreamedSource(streamed_config(broken, "images"))
    with pytest.raises(CorruptData, match="an image that cannot be decoded"):
        part_of(source, 0, 1).take(1)


@pytest.mark.parametrize("kind", KINDS)
def test_validation_samples_are_the_first_that_are_held_out(kind: str, paths: dict[str, Path]) -> None:
    source = StreamedSource(streamed_config(paths[kind], kind))
    held_out = documents_of(paths[kind], kind, "validation")
    few, all_of_them = source.validation(2), source.validation(10_000)
    assert few.samples == 2
    assert few.examples_read < all_of_them.examples_read
    fields, hashes = few.gather(np.array([1, 0, 1]))
    assert hashes.tolist() == all_of_them.gather(np.array([1, 0, 1]))[1].tolist()
    assert all(len(values) == 3 for values in fields.values())
    found = documents_in(all_of_them.gather(np.arange(all_of_them.samples))[0])
    assert set(found) <= set(held_out)
    assert len(found) >= len(held_out) - 2  # the tail that fills no sample is left out
    assert not set(found) & set(documents_of(paths[kind], kind, "train"))
    with pytest.raises(IndexError):
        few.gather(np.array([2]))


def test_a_source_without_validation_samples_is_refused(paths: dict[str, Path]) -> None:
    source = StreamedSource(streamed_config(paths["text"], "text", sequence_tokens=100_000))
    with pytest.raises(
        ValueError, match=r"no validation sample among its 42 documents with data\.validation_fraction 0\.2"
    ):
        source.validation(1)


def test_the_identity_of_a_stream_is_its_source_and_what_shapes_its_samples(tmp_path: Path) -> None:
    path = write_source(tmp_path / "source", "jsonl")
    fingerprint = StreamedSource(streamed_config(path, "jsonl")).fingerprint
    assert StreamedSource(streamed_config(path, "jsonl", prefetch_steps=9)).fingerprint == fingerprint
    for change in ({"validation_fraction": 0.3}, {"shuffle_buffer_samples": 4}, {"source": f"hf:{path}#text"}):
        assert StreamedSource(streamed_config(path, "jsonl", **change)).fingerprint != fingerprint
    (path / "9.jsonl").write_text('{"text": "one more"}\n')
    assert StreamedSource(streamed_config(path, "jsonl")).fingerprint != fingerprint


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("text", {"image_size_pixels": 8}, "image_size_pixels means nothing to data.source=.*, which is text"),
        ("images", {"sequence_tokens": 8}, "sequence_tokens means nothing to data.source=.*, which is images"),
        ("images", {"image_size_pixels": None}, "set data.image_size_pixels and data.image_channels"),
        ("text", {"tokenizer": "/nowhere/tokenizer.json"}, "there is no such file"),
        ("text", {"source": "hf:/nowhere"}, "`datasets` cannot load split 'train'"),
        ("text", {"source": "hf:{path}@test"}, "`datasets` cannot load split 'test'"),
        ("text", {"source": "hf:{path}#body"}, "no column 'body'; its columns are"),
    ],
)
def test_what_does_not_fit_is_refused(kind: str, changes: dict[str, Any], message: str, paths: dict[str, Path]) -> None:
    changes = {key: value.format(path=paths[kind]) if key == "source" else value for key, value in changes.items()}
    with pytest.raises(ValueError, match=message):
        StreamedSource(streamed_config(paths[kind], kind, **changes))


def test_labels_without_names_are_refused(tmp_path: Path) -> None:
    path = write_source(tmp_path / "images", "images")
    records = [{"file_name": str(file.relative_to(path)), "label": 1} for file in sorted(path.rglob("*.png"))]
    (path / "metadata.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    with pytest.raises(ValueError, match="column 'label' holds numbers and not class names"):
        StreamedSource(streamed_config(path, "images"))


@pytest.mark.parametrize("kind", KINDS)
def test_parts_side_by_side_in_one_process_do_not_disturb_each_other(kind: str, paths: dict[str, Path]) -> None:
    """Three parts of four files: each reads everything, from iterators of `datasets` that must not share their places."""
    source = StreamedSource(streamed_config(paths[kind], kind))
    count = samples_of_epochs(source, len(documents_of(paths[kind], kind, "train")) // 3, 2)
    alone = [part_of(source, number, 3).take(count)[1].tolist() for number in range(3)]
    parts = [part_of(source, number, 3) for number in range(3)]
    for taken in range(0, count, 2):
        resumed = [part_of(source, number, 3, stored(part.place)) for number, part in enumerate(parts)]
        assert [part.take(count - taken)[1].tolist() for part in resumed] == [hashes[taken:] for hashes in alone]
        for number, part in enumerate(parts):
            assert part.take(min(2, count - taken))[1].tolist() == alone[number][taken : taken + 2]
