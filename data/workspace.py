"""The workspace of a preparation: what is finished, so that whoever comes next goes on from there.

It lies beside the dataset's directory, as `.NAME.preparing/HASH/`, where HASH names the plan: processes of another plan, should
one still run, work elsewhere.

    plan.json, tokenizer.json           the plan; which tokenizer lies in dataset/, and its hash
    units/00000007.json, .train.data    a finished unit: its record, and for each split its documents, one after the other
    groups/00000003.json                a finished group: its record; its shards lie in dataset/
    dataset/                            what becomes the dataset's directory
    parts/8                             8 parts share the work
    temporary/                          files being written, a directory for each process

Every file gets its name when it is complete, and two processes that make the same one make the same bytes. A record
holds its own hash and those of the files it speaks for; nothing is believed that does not agree with them.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import xxhash
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from data.manifest import BLOCK_BYTES, MANIFEST_NAME, Count, FileEntry, Sha256, ShardEntry, Split, TokenizerEntry
from data.units import Plan, parse_plan

PartName = Literal["data", "ends", "labels"]
Natural = Annotated[int, Field(ge=0, lt=1 << 62)]
# Channels, height and width; None where the images differ.
Shape = tuple[Literal[1, 3] | None, Count | None, Count | None]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Content(_Record):
    """What a unit or a group holds; `size_bytes` of text or of encoded images, `empty` texts were left out. The rest is of
    images."""

    documents: Natural = 0
    empty: Natural = 0
    tokens: Natural = 0
    size_bytes: Natural = 0
    shape: Shape | None = None
    highest_label: Natural = 0

    @classmethod
    def together(cls, contents: Sequence["Content"]) -> "Content":
        """The sum."""
        return cls(
            documents=sum(content.documents for content in contents),
            empty=sum(content.empty for content in contents),
            tokens=sum(content.tokens for content in contents),
            size_bytes=sum(content.size_bytes for content in contents),
            shape=common_shape(content.shape for content in contents),
            highest_label=max((content.highest_label for content in contents), default=0),
        )


def common_shape(shapes: Iterable[Shape | None]) -> Shape | None:
    """What holds for all shapes; None if there are none."""
    distinct = {shape for shape in shapes if shape is not None}
    if not distinct:
        return None
    channels, heights, widths = ({shape[axis] for shape in distinct} for axis in range(3))
    return (
        channels.pop() if len(channels) == 1 else None,  # type: ignore[return-value]
        heights.pop() if len(heights) == 1 else None,
        widths.pop() if len(widths) == 1 else None,
    )


class PartEntry(_Record):
    """A file of a unit: its size and xxh3-128."""

    bytes: Count
    xxh3: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]


class UnitRecord(_Record):
    """A finished unit, made with the tokenizer of that hash. Each split has the parts data, ends and, of images, labels."""

    unit: Natural
    tokenizer: Sha256 | None
    content: Content
    splits: dict[Split, dict[PartName, PartEntry]]


class GroupRecord(_Record):
    """A finished group, and its shards in dataset/."""

    group: Natural
    tokenizer: Sha256 | None
    content: Content
    splits: dict[Split, tuple[ShardEntry, ...]]


class TokenizerRecord(_Record):
    """The tokenizer in dataset/."""

    entry: TokenizerEntry


AnyRecord = TypeVar("AnyRecord", UnitRecord, GroupRecord, TokenizerRecord)


class Workspace:
    """One plan's workspace."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.dataset = root / "dataset"
        self.plan_path = root / "plan.json"
        self.tokenizer_path = root / "tokenizer.json"
        self.manifest_path = self.dataset / MANIFEST_NAME
        self._temporary: Path | None = None

    def make(self, plan: Plan) -> None:
        """Make what is not there yet."""
        for name in ("units", "groups", "dataset", "temporary"):
            (self.root / name).mkdir(parents=True, exist_ok=True)
        content = plan.to_bytes()
        if not self.plan_path.exists() or self.plan_path.read_bytes() != content:
            self.publish_bytes(content, self.plan_path)

    def plan(self) -> Plan | None:
        """The plan that lies here; None if it is not there or not as it was written."""
        try:
            plan = parse_plan(self.plan_path.read_bytes())
        except FileNotFoundError:
            return None
        return plan if plan is not None and self.root.name == directory_name(plan) else None

    def note_parts(self, count: int) -> None:
        """Note that so many parts share the work: for messages alone."""
        (self.root / "parts").mkdir(exist_ok=True)
        (self.root / "parts" / str(count)).touch()

    def noted_parts(self) -> list[int]:
        """The numbers of parts that were noted."""
        folder = self.root / "parts"
        names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
        return sorted(int(name) for name in names if name.isascii() and name.isdigit() and int(name) > 0)

    def temporary(self, name: str) -> Path:
        """Where this process may write a file that has no name yet."""
        if self._temporary is None:
            self._temporary = Path(tempfile.mkdtemp(dir=self.root / "temporary"))
        return self._temporary / name

    def drop_temporary(self) -> None:
        """Remove the unfinished files of all processes: for one who knows that there are no others."""
        shutil.rmtree(self.root / "temporary", ignore_errors=True)
        self._temporary = None
        (self.root / "temporary").mkdir(exist_ok=True)

    def publish(self, written: Path, path: Path) -> None:
        """Give a complete file its name."""
        os.replace(written, path)

    def publish_bytes(self, content: bytes, path: Path) -> None:
        """Write a small file under a temporary name and give it its own."""
        written = self.temporary(path.name)
        written.write_bytes(content)
        self.publish(written, path)

    def unit_path(self, unit: int) -> Path:
        """The record of a unit."""
        return self.root / "units" / f"{unit:08d}.json"

    def part_path(self, unit: int, split: str, part: str) -> Path:
        """A file of a unit."""
        return self.root / "units" / f"{unit:08d}.{split}.{part}"

    def group_path(self, group: int) -> Path:
        """The record of a group."""
        return self.root / "groups" / f"{group:08d}.json"

    def drop_unit(self, record: UnitRecord) -> None:
        """Remove a unit whose documents are in shards."""
        self.unit_path(record.unit).unlink(missing_ok=True)
        for split, parts in record.splits.items():
            for part in parts:
                self.part_path(record.unit, split, part).unlink(missing_ok=True)

    def write_record(self, record: BaseModel, path: Path) -> None:
        """Write a record, with its hash."""
        body = record.model_dump(mode="json")
        self.publish_bytes(json.dumps({"hash": _hash_of(body), "record": body}).encode(), path)

    def read_record(self, path: Path, kind: type[AnyRecord]) -> AnyRecord | None:
        """A record; None if it is not there, or anything of it is not as it was written."""
        try:
            document = json.loads(path.read_bytes())
            if document["hash"] != _hash_of(document["record"]):
                return None
            return kind.model_validate_json(json.dumps(document["record"]))
        except (OSError, ValueError, ValidationError, RecursionError, LookupError, TypeError):
            return None

    def unit_record(self, unit: int, tokenizer: str | None) -> UnitRecord | None:
        """The record of a finished unit, if there is one to be believed; its files are not looked into."""
        record = self.read_record(self.unit_path(unit), UnitRecord)
        return record if record is not None and (record.unit, record.tokenizer) == (unit, tokenizer) else None

    def group_record(self, group: int, tokenizer: str | None) -> GroupRecord | None:
        """The record of a finished group, if there is one to be believed; its shards are not looked into."""
        record = self.read_record(self.group_path(group), GroupRecord)
        return record if record is not None and (record.group, record.tokenizer) == (group, tokenizer) else None


def directory_name(plan: Plan) -> str:
    """The name of a plan's workspace."""
    return plan.hash[:16]


def tokenizer_hash(entry: TokenizerEntry | None) -> str | None:
    """What records name a tokenizer by; None for images, and for bytes."""
    return None if entry is None or entry.file is None else entry.file.sha256


def is_intact(directory: Path, entry: FileEntry) -> bool:
    """Whether a file is, byte for byte, the one that was written. No link is followed."""
    sha256, blocks = hashlib.sha256(), []
    try:
        with open(os.open(directory / entry.name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
            if os.fstat(file.fileno()).st_size != entry.bytes:
                return False
            while block := file.read(BLOCK_BYTES):
                sha256.update(block)
                blocks.append(xxhash.xxh3_64_hexdigest(block))
    except OSError:
        return False
    return sha256.hexdigest() == entry.sha256 and tuple(blocks) == entry.blocks


def _hash_of(body: Any) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
