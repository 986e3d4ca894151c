"""`lockstep data info|verify`: what lies in a prepared dataset, and whether it is as it was prepared. Imports no torch."""

from __future__ import annotations

import shutil
from collections.abc import Sequence

from data.config import DataConfig
from data.errors import CorruptData
from data.examples import Examples, shorten
from data.manifest import Manifest
from data.origin import ORIGIN_NAME, read_origin
from data.parallel import each
from data.store import open_fresh_store, open_store, read_manifest
from data.verification import Verifier, items_of, packed_items, packings_among, unlisted_files
from launch.exit_codes import DO_NOT_RESTART, DONE
from launch.tables import Bar, format_table


def show_info(address: str, split: str | None, examples: int) -> int:
    """Prints what a dataset is made of, and some of it decoded. Returns an exit code."""
    store = open_store(address, DataConfig())
    manifest = read_manifest(store)
    shown = list(manifest.splits) if split is None else [name for name in manifest.splits if name == split]
    if not shown:
        raise ValueError(f"--split {split}: {address} has no such split, only {', '.join(manifest.splits)}")
    width = shutil.get_terminal_size().columns
    print("\n".join(_facts(manifest, width)))
    print(format_table([("split", "documents", "tokens", "bytes", "shards"), *(_counts(manifest, n) for n in shown)]))
    for name in shown if examples else ():
        found = Examples(store, manifest, name)
        print()
        for number in found.spread(examples):
            title = f"{name} {number:,}: "
            print(title + found.describe(number, width - len(title)))
    return DONE


def _facts(manifest: Manifest, width: int) -> list[str]:
    lines = [
        f"kind         {manifest.kind}" + (f", {manifest.dtype}" if manifest.dtype else ""),
        f"fingerprint  {manifest.fingerprint}",
    ]
    for source in manifest.sources:
        lines.append(f"source       {shorten(f'{source.address}: {source.description}', width - 13)}")
    if manifest.tokenizer is not None:
        tokenizer = manifest.tokenizer
        ends = f"{tokenizer.end_of_document} ends a document"
        lines.append(f"tokenizer    {tokenizer.spec}: {tokenizer.vocabulary_size:,} tokens, {ends}")
    if manifest.images is not None:
        images = manifest.images
        size = f"{images.width_pixels} x {images.height_pixels} pixels" if images.width_pixels else "of several sizes"
        kind = {1: "grey", 3: "colour", None: "grey and colour"}[images.channels]
        lines.append(f"images       {kind}, {size}")
        names = ", ".join(images.class_names)
        lines.append(f"classes      {shorten(f'{len(images.class_names)}: {names}', width - 13)}")
    return lines


def _counts(manifest: Manifest, name: str) -> tuple[str, ...]:
    split = next(entry for split, entry in manifest.splits.items() if split == name)
    size = sum(file.bytes for shard in split.shards for file in shard.files())
    tokens = "-" if split.tokens is None else f"{split.tokens:,}"
    return name, f"{split.documents:,}", tokens, f"{size:,}", str(len(split.shards))


def verify_dataset(address: str, workers: int, sequence_tokens: Sequence[int] = ()) -> int:
    """Reads every byte of a dataset, at an address every one anew, and prints every problem, then a line of sum.

    The packing indexes for sequences of so many tokens must be there; all others that can be found are read too. Returns
    an exit code.
    """
    store = open_fresh_store(address)
    manifest = read_manifest(store)
    names = store.names()
    problems: list[str] = []
    packings = {*sequence_tokens, *packings_among(names or ())}
    items = [*items_of(manifest), *packed_items(store, manifest, packings, problems)]
    if ORIGIN_NAME in (names or ()):
        try:
            read_origin(store)
        except CorruptData as error:
            problems.append(str(error))
    total = sum(item.bytes for item in items)
    with Bar("verifying", total, of_bytes=True) as bar:
        for problem in problems:
            bar.say(f"BAD: {problem}")
        for found in each(Verifier, address, items, workers=min(workers, len(items))):
            for problem in found.problems:
                bar.say(f"BAD: {problem}")
            problems += found.problems
            bar.advance(found.item.bytes)
    for name in unlisted_files(names or (), items):
        print(f"not listed: {address}/{name} is not of the dataset; nothing reads it")
    if names is None:
        print(
            f"not checked: {address} cannot be listed, so that only what its manifest lists was read; name its packing "
            "indexes by --pack-tokens T"
        )
    files = sum(len(item.files) for item in items)
    state = "good" if not problems else f"BAD: {len(problems)} problem{'s' if len(problems) > 1 else ''}"
    print(f"{address}: {state}; {files} files, {total:,} bytes, fingerprint {manifest.fingerprint}")
    return DO_NOT_RESTART if problems else DONE
