"""The tokenizer of a preparation: read, or trained on training documents of its sources."""

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path

from data.build import split_of, utf8
from data.config import DataConfig
from data.manifest import FORMAT_VERSION, TokenizerEntry
from data.naming import fraction_of
from data.source_reading import Document, read_unit
from data.sources import Source, open_source, source_state
from data.tokenizers import (
    TOKENIZER_NAME,
    ByteTokenizer,
    SubwordTokenizer,
    Tokenizer,
    load_published,
    tokenizer_entry,
    train_bpe,
)
from data.units import Unit, input_of, plan_units
from data.workspace import TokenizerRecord, Workspace, is_intact

# A vocabulary does not get better from more text than this, but training it takes memory for it.
MOST_TRAINING_BYTES = 1 << 30

Tell = Callable[[str], None]


def identify_tokenizer(spec: str) -> tuple[str, Tokenizer | None]:
    """What names a tokenizer, its version included, in a plan; and the tokenizer itself unless it is to be trained."""
    if spec == "bytes":
        return spec, ByteTokenizer()
    if spec.startswith("bpe:"):
        return f"{spec} of tokenizers {version('tokenizers')}, {MOST_TRAINING_BYTES} bytes", None
    tokenizer = load_published(spec)
    return f"{spec} {hashlib.sha256(tokenizer.to_json().encode()).hexdigest()}", tokenizer


def place_tokenizer(
    workspace: Workspace,
    config: DataConfig,
    given: Tokenizer | None,
    sources: Sequence[Source],
    units: Sequence[Unit],
    tell: Tell,
) -> TokenizerEntry:
    """Put the tokenizer into the workspace, trained where it is not `given` and does not lie there already."""
    if given is None and (found := tokenizer_there(workspace, config.tokenizer)) is not None:
        return found
    tokenizer = given or train_tokenizer(config.tokenizer, [(config, sources, units)], tell)
    entry = tokenizer_entry(tokenizer, config.tokenizer, workspace.temporary(TOKENIZER_NAME))
    if entry.file is not None:
        workspace.publish(workspace.temporary(TOKENIZER_NAME), workspace.dataset / TOKENIZER_NAME)
    workspace.write_record(TokenizerRecord(entry=entry), workspace.tokenizer_path)
    return entry


def tokenizer_there(workspace: Workspace, spec: str) -> TokenizerEntry | None:
    """The tokenizer in the workspace; None unless its file and all that is said of it agree."""
    record = workspace.read_record(workspace.tokenizer_path, TokenizerRecord)
    if record is None:
        return None
    if spec == "bytes":
        tokenizer: Tokenizer = ByteTokenizer()
    elif record.entry.file is None or not is_intact(workspace.dataset, record.entry.file):
        return None
    else:
        tokenizer = load_published(str(workspace.dataset / TOKENIZER_NAME))
    derived = TokenizerEntry(
        spec=spec,
        file=None if spec == "bytes" else record.entry.file,
        vocabulary_size=tokenizer.vocabulary_size,
        end_of_document=tokenizer.end_of_document,
    )
    return derived if derived == record.entry else None


def train_tokenizer(
    spec: str, corpora: Sequence[tuple[DataConfig, Sequence[Source], Sequence[Unit]]], tell: Tell
) -> SubwordTokenizer:
    """BPE trained on training documents alone: all of them, or, of more than 1 GiB, those of units all over the sources."""
    counted = 0
    complete = True

    def texts() -> Iterator[str]:
        nonlocal counted, complete
        for document in _training_documents(corpora):
            counted += len(utf8(document))
            if counted > MOST_TRAINING_BYTES:
                complete = False
                return
            yield document.text

    tokenizer = train_bpe(spec, texts())
    if not complete:
        tell(f"{spec} trained on the first {MOST_TRAINING_BYTES / 2**30:g} GiB of text found all over the sources")
    return tokenizer


def _training_documents(
    corpora: Sequence[tuple[DataConfig, Sequence[Source], Sequence[Unit]]],
) -> Iterator[Document]:
    every = [(config, sources, unit) for config, sources, units in corpora for unit in units]
    for number in _spread(len(every)):
        config, sources, unit = every[number]
        fraction = fraction_of(config)
        unit_input = input_of(unit, sources, None)
        if unit_input.into not in (None, "train"):
            continue
        for document in read_unit(unit_input):
            assert isinstance(document, Document)
            if not document.text:
                continue
            if unit_input.into == "train" or (fraction and split_of(utf8(document), fraction) == "train"):
                yield document


def _spread(count: int) -> Iterator[int]:
    """The numbers below `count` in an order whose every beginning is spread over all of them: by their bits, reversed."""
    bits = max(1, (count - 1).bit_length())
    for number in range(1 << bits):
        place = int(f"{number:0{bits}b}"[::-1], 2)
        if place < count:
            yield place


def prepare_tokenizer(configs: Sequence[DataConfig], *, tell: Tell | None = None) -> Path:
    """Train one `bpe:SIZE` on the training documents of several datasets together, unless that was done before.

    Returns the path of its file, under prepared/, named by all that determines it: what `data.tokenizer` of each may then
    be. ValueError where they do not agree on `bpe:SIZE`, or one is not text.
    """
    specs = sorted({config.tokenizer for config in configs})
    if len(specs) != 1 or not specs[0].startswith("bpe:"):
        raise ValueError(
            f"data.tokenizer {', '.join(specs)}: one bpe:SIZE is needed to train a tokenizer for all sources"
        )
    identity = {
        "format_version": FORMAT_VERSION,
        "tokenizer": identify_tokenizer(specs[0])[0],
        "sources": [[(source.given, source_state(source.address)) for source in config.sources] for config in configs],
        "validation_fractions": [fraction_of(config) for config in configs],
    }
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
    path = Path("prepared") / f"tokenizer-{re.sub('[^a-z0-9]+', '-', specs[0])}-{digest}.json"
    if path.exists():
        return path
    corpora = []
    for config in configs:
        sources = [open_source(given) for given in config.sources]
        if any(source.class_names is not None for source in sources):
            raise ValueError(f"data.source={config.source_text}: images have no text to train a tokenizer on")
        corpora.append((config, sources, plan_units(sources)))
    tokenizer = train_tokenizer(specs[0], corpora, tell or _ignore)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".tokenizer-") as folder:
        written = Path(folder, path.name)
        tokenizer_entry(tokenizer, specs[0], written)
        os.replace(written, path)
    return path


def _ignore(line: str) -> None:
    """For callers that need not be told."""
