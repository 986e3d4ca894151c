"""Tokenizers: raw bytes, byte-level BPE trained on the corpus, or any tokenizer of Hugging Face's library."""

import abc
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from data.config import bpe_size
from data.manifest import TokenizerEntry
from data.shards import CheckedFile, HashingFile
from data.store import Store, read_manifest

TOKENIZER_NAME = "tokenizer.json"
END_OF_DOCUMENT = "<|endoftext|>"
# What published tokenizers call the end of a document, most specific first.
END_OF_DOCUMENT_NAMES = (END_OF_DOCUMENT, "<|end_of_text|>", "</s>", "<eos>")

TokenIds = npt.NDArray[np.uint16] | npt.NDArray[np.uint32]


class Tokenizer(abc.ABC):
    """Text to token ids and back. `encode` adds no special tokens; preparation appends `end_of_document` itself."""

    def __init__(self, vocabulary_size: int, end_of_document: int) -> None:
        self.vocabulary_size = vocabulary_size
        self.end_of_document = end_of_document
        self.dtype = np.dtype(np.uint16 if vocabulary_size <= 1 << 16 else np.uint32)

    @abc.abstractmethod
    def encode_batch(self, texts: list[str]) -> list[TokenIds]:
        """Token ids (n,) of each text, in the smallest of uint16 and uint32 that holds the vocabulary."""

    @abc.abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids; special tokens are left out, bytes that are not UTF-8 become U+FFFD."""

    @abc.abstractmethod
    def token_bytes(self) -> npt.NDArray[np.int64]:
        """Bytes of text each token stands for (vocabulary_size,), 0 for special tokens.

        What a tokenizer drops from the text (WordPiece: white space) is counted nowhere.
        """

    def encode(self, text: str) -> TokenIds:
        """Token ids (n,) of a text."""
        return self.encode_batch([text])[0]


class ByteTokenizer(Tokenizer):
    """Token k is byte k of the text's UTF-8; 256 ends a document."""

    def __init__(self) -> None:
        super().__init__(vocabulary_size=257, end_of_document=256)

    def encode_batch(self, texts: list[str]) -> list[TokenIds]:
        return [np.frombuffer(text.encode(), dtype=np.uint8).astype(np.uint16) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(int(token) for token in ids if token != self.end_of_document).decode("utf-8", errors="replace")

    def token_bytes(self) -> npt.NDArray[np.int64]:
        return np.array([1] * 256 + [0], dtype=np.int64)


class SubwordTokenizer(Tokenizer):
    """A tokenizer of the `tokenizers` library. Special tokens that stand in a raw text are encoded as ordinary text.

    Added tokens that are not special are part of the vocabulary like any other, so those are found in raw text.
    """

    def __init__(self, backend: tokenizers.Tokenizer, end_of_document: int) -> None:
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True
        super().__init__(max(backend.get_vocab(with_added_tokens=True).values()) + 1, end_of_document)
        self._backend = backend

    def encode_batch(self, texts: list[str]) -> list[TokenIds]:
        encodings = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, dtype=self.dtype) for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        text = [int(token) for token in ids if token != self.end_of_document]
        return str(self._backend.decode(text, skip_special_tokens=True))

    def token_bytes(self) -> npt.NDArray[np.int64]:
        lengths = np.zeros(self.vocabulary_size, dtype=np.int64)
        added = self._backend.get_added_tokens_decoder()
        description = self._backend.to_str()
        for token, number in self._backend.get_vocab(with_added_tokens=True).items():
            if number in added:
                lengths[number] = 0 if added[number].special else len(added[number].content.encode())
            elif '"type":"ByteLevel"' in description:
                lengths[number] = len(token)  # byte-level tokens are spelt with one character for each byte
            elif len(token) == 6 and token.startswith("<0x"):
                lengths[number] = 1  # a byte that the vocabulary has no character for, such as <0x0A>
            else:
                lengths[number] = len(token.replace("\u2581", " ").removeprefix("##").encode())
        lengths[self.end_of_document] = 0
        return lengths

    def to_json(self) -> str:
        """The content of Hugging Face's tokenizer.json."""
        return str(self._backend.to_str(pretty=True))


def train_bpe(spec: str, texts: Iterator[str]) -> SubwordTokenizer:
    """Byte-level BPE (Sennrich et al., 2016; on bytes: Radford et al., 2019) of exactly the size in `bpe:SIZE`."""
    size = bpe_size(spec)
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[END_OF_DOCUMENT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    reached = backend.get_vocab_size()
    if reached != size:
        raise ValueError(f"tokenizer {spec!r}: the corpus is too small for it; use bpe:{reached} or less, or more text")
    return _with_end_of_document(backend, spec)


def load_published(spec: str) -> SubwordTokenizer:
    """The tokenizer of a file, where `spec` is a path, or of a Hugging Face hub name; ValueError if neither."""
    path = Path(spec).expanduser()
    if path.suffix == ".json" or path.exists():
        if not path.is_file():
            raise ValueError(f"tokenizer {spec!r}: there is no such file; give a tokenizer.json or a hub name")
        return _with_end_of_document(_parse(path.read_bytes(), spec), spec)
    try:
        backend = tokenizers.Tokenizer.from_pretrained(spec)
    except Exception as error:  # the library raises bare Exception for every failure of the hub
        raise ValueError(f"tokenizer {spec!r}: not a file, and not found on the hub: {_one_line(error)}") from error
    return _with_end_of_document(backend, spec)


def _parse(content: bytes, spec: str) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_str(content.decode())
    except Exception as error:  # the library raises bare Exception for a malformed file
        raise ValueError(f"tokenizer {spec!r}: not a tokenizer.json: {_one_line(error)}") from error


def _with_end_of_document(backend: tokenizers.Tokenizer, spec: str) -> SubwordTokenizer:
    for name in END_OF_DOCUMENT_NAMES:
        number = backend.token_to_id(name)
        if number is not None:
            return SubwordTokenizer(backend, number)
    raise ValueError(
        f"tokenizer {spec!r}: it has no token for the end of a document; add one of {', '.join(END_OF_DOCUMENT_NAMES)}"
    )


def tokenizer_entry(tokenizer: Tokenizer, spec: str, path: Path) -> TokenizerEntry:
    """Save a tokenizer as `path`, where it has a file, and describe it for the manifest."""
    entry = None
    if isinstance(tokenizer, SubwordTokenizer):
        with HashingFile(path) as file:
            file.write(tokenizer.to_json().encode())
            entry = file.finish()
    return TokenizerEntry(
        spec=spec,
        file=entry,
        vocabulary_size=tokenizer.vocabulary_size,
        end_of_document=tokenizer.end_of_document,
    )


def open_tokenizer(store: Store, entry: TokenizerEntry) -> Tokenizer:
    """The tokenizer of an entry, its file checked."""
    if entry.file is None:
        return ByteTokenizer()
    file = CheckedFile(store, entry.file)
    file.check_all()
    return SubwordTokenizer(_parse(bytes(file.map), file.path), entry.end_of_document)


def load_tokenizer(store: Store) -> Tokenizer:
    """The tokenizer that a prepared dataset was made with, its file checked against the manifest."""
    entry = read_manifest(store).tokenizer
    if entry is None:
        raise ValueError(f"{store.address}: a dataset of images has no tokenizer; choose a dataset of tokens")
    return open_tokenizer(store, entry)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
