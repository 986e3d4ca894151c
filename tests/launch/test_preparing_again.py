"""What is told of a dataset that lies there already: when it was made, and whether its sources are still what they were."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from data.origin import ORIGIN_NAME
from data.tokenizers import train_bpe
from launch.cli import main
from tests.data.data_helpers import contents, lorem, write_jsonl


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(40):
        (folder / f"{number:02d}.txt").write_text(lorem(number))
    return folder


def prepared_again(capsys: pytest.CaptureFixture[str], *words: object) -> list[str]:
    """The lines of `lockstep prepare ... --out made` of a dataset that is there."""
    capsys.readouterr()
    assert main(["prepare", *map(str, words), "--out", "made"]) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    return shown.out.splitlines()


def test_a_changed_source_is_told_and_the_dataset_used_as_it_is(
    source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = prepared_again(capsys, f"text:{source}")
    assert first[0].startswith("preparing ")
    before = contents(Path("made"))
    told = prepared_again(capsys, f"text:{source}")
    assert len(told) == 2
    assert told[0].startswith("made: was prepared before (20")
    assert "they were not read again; to prepare anew, remove it or name another directory" in told[0]
    (source / "07.txt").write_text("something else")
    warning = (
        f"warning: made: source text:{source} has changed since it was prepared, and the dataset is used as it was made"
    )
    assert prepared_again(capsys, f"text:{source}")[1].startswith(warning)
    shutil.rmtree(source)
    assert "cannot be told: source" in prepared_again(capsys, f"text:{source}")[1]
    assert contents(Path("made")) == before
    assert main(["data", "verify", "made", "--workers", "1"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_a_dataset_without_a_record_of_its_sources_is_as_good(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prepared_again(capsys, f"text:{source}")
    (Path("made") / ORIGIN_NAME).unlink()
    told = prepared_again(capsys, f"text:{source}")
    assert told[1] == f"made: whether source text:{source} has changed since cannot be told: its state was not recorded"
    assert main(["data", "verify", "made", "--workers", "1"]) == 0
    (Path("made") / ORIGIN_NAME).write_bytes(b"{")
    damaged = f"made/{ORIGIN_NAME}: altered or damaged; restore or remove it"
    for command in (["prepare", f"text:{source}", "--out", "made"], ["data", "verify", "made", "--workers", "1"]):
        assert main(command) == 78
        shown = capsys.readouterr()
        assert damaged in shown.out + shown.err


def test_parts_record_their_sources_too(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prepare", f"text:{source}", "--out", "made", "--part", "1/1"]) == 0
    assert main(["data", "merge", "made"]) == 0
    assert len(prepared_again(capsys, f"text:{source}")) == 2
    (source / "40.txt").write_text("one more")
    assert "has changed since it was prepared" in prepared_again(capsys, f"text:{source}")[1]


def test_another_tokenizer_in_the_same_file_is_refused(
    tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = tmp_path / "tokenizer.json"
    texts = [lorem(number) for number in range(40)]
    tokenizer.write_text(train_bpe("bpe:300", iter(texts)).to_json())
    corpus = f"jsonl:{write_jsonl(tmp_path / 'corpus.jsonl', texts)}#text"
    words = (corpus, "--tokenizer", tokenizer)
    prepared_again(capsys, *words)
    assert len(prepared_again(capsys, *words)) == 2
    tokenizer.write_text(train_bpe("bpe:290", iter(texts)).to_json())
    assert main(["prepare", *map(str, words), "--out", "made"]) == 2
    refused = capsys.readouterr().err
    assert refused.startswith(
        f"lockstep: error: made: prepared with another tokenizer than {tokenizer} holds now; restore"
    )
    assert refused.count("\n") == 1
    tokenizer.unlink()  # nothing is to be compared with, and the dataset holds its own
    assert len(prepared_again(capsys, *words)) == 2
