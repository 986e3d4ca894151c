"""What makes a directory of shards a dataset: its manifest, and nothing else in it but what it was prepared from."""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from data.manifest import MANIFEST_NAME, ImagesEntry, Manifest, SourceEntry, SplitEntry, TokenizerEntry
from data.origin import ORIGIN_NAME, origin_of
from data.shards import HashingFile
from data.units import Plan
from data.workspace import Content, GroupRecord, Workspace


def finish_dataset(
    workspace: Workspace, plan: Plan, tokenizer: TokenizerEntry | None, records: Sequence[GroupRecord]
) -> None:
    """Write the manifest of all groups, in order, beside their shards; ValueError where a split has no documents."""
    content = Content.together([record.content for record in records])
    manifest = Manifest(
        kind=plan.kind,
        sources=tuple(SourceEntry(address=source.given, description=source.description) for source in plan.sources),
        validation_fraction=plan.validation_fraction,
        shard_bytes=plan.shard_bytes,
        dtype=plan.dtype,
        tokenizer=tokenizer,
        images=None if plan.class_names is None else _images_entry(plan, content),
        splits=_splits(plan, records, content),
    )
    listed = {MANIFEST_NAME, *(entry.name for entry in manifest.files())}
    for path in workspace.dataset.iterdir():
        if path.name not in listed:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    workspace.publish_bytes(origin_of(plan).to_bytes(), workspace.dataset / ORIGIN_NAME)
    with HashingFile(workspace.temporary(MANIFEST_NAME)) as file:
        file.write(manifest.to_bytes())
        file.finish()
    workspace.publish(file.path, workspace.dataset / MANIFEST_NAME)
    sync_directory(workspace.dataset)


def _splits(plan: Plan, records: Sequence[GroupRecord], content: Content) -> dict[str, SplitEntry]:
    what = "documents" if plan.kind == "tokens" else "images"
    given = ", ".join(source.given for source in plan.sources)
    if not content.documents:
        raise ValueError(f"source {given}: empty, there are no {what} in it; correct data.source")
    splits: dict[str, SplitEntry] = {}
    for name in plan.splits:
        shards = tuple(shard for record in records for shard in record.splits.get(name, ()))
        if not shards and plan.validation_fraction is not None and name in ("train", "validation"):
            raise ValueError(
                f"source {given}: no {what} for {name} with data.validation_fraction {plan.validation_fraction} "
                f"(each of the {content.documents} goes to one side, by its hash); change the fraction or give more {what}"
            )
        if not shards:
            raise ValueError(f"source {given}: no {what} for {name}; correct data.source")
        tokens = sum(shard.tokens or 0 for shard in shards)
        documents = sum(shard.documents for shard in shards)
        splits[name] = SplitEntry(documents=documents, tokens=tokens or None, shards=shards)
    return splits


def _images_entry(plan: Plan, content: Content) -> ImagesEntry:
    assert plan.class_names is not None
    names = plan.class_names or tuple(str(label) for label in range(content.highest_label + 1))
    if content.highest_label >= len(names):
        given = ", ".join(source.given for source in plan.sources)
        raise ValueError(f"source {given}: label {content.highest_label}, but there are only {len(names)} classes")
    channels, height, width = content.shape or (None, None, None)
    return ImagesEntry(class_names=names, channels=channels, height_pixels=height, width_pixels=width)


def sync_directory(path: Path) -> None:
    """Make sure that the names in a directory reach the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
