"""Bytes, BPE trained on the corpus, and published tokenizers: exact round trips, and sizes that can be trusted."""

import re
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers

from data import units, vocabulary
from data.build import split_of
from data.config import DataConfig
from data.dataset import open_dataset
from data.prepare import prepare
from data.store import LocalStore, read_manifest
from data.tokenizers import ByteTokenizer, SubwordTokenizer, Tokenizer, load_published, load_tokenizer, train_bpe
from data.vocabulary import prepare_tokenizer
from tests.data.data_helpers import lorem, token_config, write_jsonl

TEXTS = [lorem(number) for number in range(60)]
AWKWARD = "Grüße <|endoftext|> 世界 🌍\n\t  two  spaces\r\n<s>x</s>\0"


@pytest.fixture(scope="module")
def bpe() -> SubwordTokenizer:
    return train_bpe("bpe:300", iter(TEXTS))


def sentence_piece_like() -> tokenizers.Tokenizer:
    """A tokenizer of the Llama kind: spaces as U+2581, unknown characters as bytes."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"abcdeo\u2581", "\u2581do", "do"]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    merges = [("d", "o"), ("\u2581", "do")]
    made = tokenizers.Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    made.normalizer = normalizers.Replace(" ", "\u2581")
    made.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    return made


@settings(deadline=None, max_examples=50)
@given(text=st.text())
def test_bytes_and_bpe_give_back_any_text(bpe: SubwordTokenizer, text: str) -> None:
    for tokenizer in (ByteTokenizer(), bpe):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids.tolist()) == text
        assert tokenizer.token_bytes()[ids].sum() == len(text.encode())
        assert ids.dtype == np.uint16


def test_special_tokens_in_a_text_are_text(bpe: SubwordTokenizer) -> None:
    for tokenizer in (ByteTokenizer(), bpe, SubwordTokenizer(sentence_piece_like(), 2)):
        ids = tokenizer.encode(AWKWARD)
        assert tokenizer.end_of_document not in ids
        assert tokenizer.decode(ids.tolist()) == AWKWARD
        assert tokenizer.token_bytes()[ids].sum() == len(AWKWARD.encode())
        assert tokenizer.token_bytes()[tokenizer.end_of_document] == 0
        assert tokenizer.decode([*tokenizer.encode("a"), tokenizer.end_of_document, *tokenizer.encode("b")]) == "ab"


def test_the_byte_vocabulary() -> None:
    tokenizer = ByteTokenizer()
    assert (tokenizer.vocabulary_size, tokenizer.end_of_document) == (257, 256)
    assert tokenizer.decode([0xE4, 0xB8, 0x80, 0xFF]) == "一\ufffd"
    with pytest.raises(ValueError, match="range"):
        tokenizer.decode([257])


def test_bpe_training_is_deterministic_and_of_the_size_asked(bpe: SubwordTokenizer) -> None:
    assert bpe.vocabulary_size == 300
    assert train_bpe("bpe:300", iter(TEXTS)).to_json() == bpe.to_json()
    assert len(bpe.encode(TEXTS[0])) < len(TEXTS[0].encode()) / 1.5
    with pytest.raises(ValueError, match=r"'bpe:5000': the corpus is too small for it; use bpe:\d+ or less"):
        train_bpe("bpe:5000", iter(TEXTS))


def roundtrip(directory: Path, config: DataConfig) -> Tokenizer:
    """Read a prepared dataset back and check its tokenizer against its tokens."""
    tokenizer = load_tokenizer(LocalStore(directory))
    dataset = open_dataset(LocalStore(directory), config, "train")
    tokens = dataset.gather(np.arange(dataset.samples))[0]["tokens"]
    assert tokens.max() < tokenizer.vocabulary_size == dataset.facts.vocabulary_size
    assert tokenizer.decode(tokens[0].tolist()).startswith("document")
    return tokenizer


def test_bpe_is_trained_on_training_documents_and_kept_with_the_dataset(tmp_path: Path) -> None:
    odd = [f"document {number} " + "zq" * 200 for number in range(40)]
    held_out = [text for text in odd if split_of(text.encode(), 0.2) == "validation"]
    assert len(held_out) > 2
    source = write_jsonl(tmp_path / "corpus.jsonl", TEXTS + held_out)
    config = DataConfig(
        source=f"jsonl:{source}#text",
        directory=tmp_path / "prepared",
        tokenizer="bpe:320",
        validation_fraction=0.2,
        sequence_tokens=16,
    )
    directory = prepare(config)
    assert roundtrip(directory, config).vocabulary_size == 320
    assert '"zq"' not in (directory / "tokenizer.json").read_text()
    assert '"zq"' in train_bpe("bpe:320", iter(TEXTS + held_out)).to_json()


def test_a_published_file_is_copied_into_the_dataset(tmp_path: Path) -> None:
    published = tmp_path / "published.json"
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = tokenizers.Tokenizer(models.BPE({letter: number for number, letter in enumerate(letters)}, []))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.add_special_tokens(["<|end_of_text|>"])
    made.enable_truncation(5)
    made.save(str(published))
    config = token_config(tmp_path, tokenizer=str(published))
    directory = prepare(config)
    published.unlink()
    tokenizer = roundtrip(directory, config)
    assert tokenizer.end_of_document == 256
    assert len(tokenizer.encode("word " * 30)) > 5  # the file's truncation does not cut documents


def test_a_large_vocabulary_is_stored_in_four_bytes(tmp_path: Path) -> None:
    pieces = {"</s>": 0, **{f"piece{number}": number for number in range(1, 70_000)}}
    pieces |= {word: 70_000 + number for number, word in enumerate(["document", "says", "word", "?"])}
    made = tokenizers.Tokenizer(models.WordLevel(pieces, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.save(str(tmp_path / "words.json"))
    config = token_config(tmp_path, tokenizer=str(tmp_path / "words.json"))
    directory = prepare(config)
    assert read_manifest(LocalStore(directory)).dtype == "uint32"
    assert roundtrip(directory, config).vocabulary_size == 70_004


def test_tokenizers_that_cannot_be_used_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="no such file"):
        load_published(str(tmp_path / "missing.json"))
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(ValueError, match=r"not a tokenizer.json"):
        load_published(str(tmp_path / "bad.json"))
    tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).save(str(tmp_path / "endless.json"))
    with pytest.raises(ValueError, match="no token for the end of a document; add one of"):
        load_published(str(tmp_path / "endless.json"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ValueError, match="not a file, and not found on the hub") as refused:
        load_published("no-such-user/no-such-tokenizer")
    assert "\n" not in str(refused.value)


def test_images_have_no_tokenizer(tmp_path: Path) -> None:
    directory = prepare(DataConfig(source="digits", directory=tmp_path / "digits"))
    with pytest.raises(ValueError, match="has no tokenizer"):
        load_tokenizer(LocalStore(directory))


def test_one_tokenizer_for_several_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    first = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    second = write_jsonl(tmp_path / "b.jsonl", ["xyzzy " * 50, "plugh " * 50])
    held_out = write_jsonl(tmp_path / "c.jsonl", ["qqqq " * 500])
    config = DataConfig(source=f"jsonl:{first}#text", tokenizer="bpe:330", validation_fraction=0.2)
    other = DataConfig(source=(f"train=jsonl:{second}#text", f"validation=jsonl:{held_out}#text"), tokenizer="bpe:330")
    path = prepare_tokenizer([config, other])
    assert path.parent == Path("prepared")
    assert re.fullmatch(r"tokenizer-bpe-330-[0-9a-f]{12}\.json", path.name)
    content = path.read_text()
    assert '"xyzzy"' in content
    assert '"qqqq' not in content
    stamp = path.stat().st_mtime_ns
    assert prepare_tokenizer([config, other]) == path
    assert path.stat().st_mtime_ns == stamp
    write_jsonl(first, TEXTS[:50])
    assert prepare_tokenizer([config, other]) != path
    used = other.model_copy(update={"tokenizer": str(path), "directory": tmp_path / "made"})
    assert load_tokenizer(LocalStore(prepare(used))).vocabulary_size == 330
    with pytest.raises(ValueError, match="one bpe:SIZE is needed"):
        prepare_tokenizer([config, used])
    assert [one.name for one in Path("prepared").iterdir() if one.name.startswith(".")] == []


def test_a_tokenizer_of_much_text_is_trained_on_a_part_of_it_all_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(units, "UNIT_BYTES", 2000)
    monkeypatch.setattr(vocabulary, "MOST_TRAINING_BYTES", 12_000)
    beginning, middle = [f"aaaa {text}" for text in TEXTS * 2], [f"mmmm {text}" for text in TEXTS * 2]
    source = write_jsonl(tmp_path / "corpus.jsonl", beginning + middle)
    config = DataConfig(source=f"jsonl:{source}#text", tokenizer="bpe:330", directory=tmp_path / "made")
    told: list[str] = []
    prepare(config, tell=told.append)
    assert told[0].startswith("bpe:330 trained on the first ")
    content = (tmp_path / "made" / "tokenizer.json").read_text()
    assert '"aaaa"' in content
    assert '"mmmm"' in content
    prepare(config.model_copy(update={"directory": tmp_path / "again"}))
    assert (tmp_path / "again" / "tokenizer.json").read_text() == content
