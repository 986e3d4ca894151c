"""Preparation: sources become a directory of shards with a manifest, completely or not at all. Imports no torch."""

import contextlib
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from data.build import Job
from data.config import DataConfig, bpe_size
from data.dataset_files import finish_dataset, sync_directory
from data.manifest import TokenizerEntry
from data.naming import is_prepared, prepared_directory
from data.origin import state_of
from data.place import (
    FULL,
    clean_up,
    exists,
    in_one_line,
    inside,
    lock_removed_with_all_else,
    locked,
    refuse_unfit,
    remove_leftovers,
    workspaces_of,
)
from data.schedule import UnitSchedule, Verification, Watch
from data.sources import Source, common_class_names, open_source
from data.store import LocalStore, read_manifest
from data.tokenizers import Tokenizer
from data.units import Plan, Unit, make_plan, plan_units
from data.vocabulary import Tell, identify_tokenizer, place_tokenizer, tokenizer_there
from data.workers import work_through
from data.workspace import GroupRecord, Workspace, directory_name, tokenizer_hash


@dataclass(frozen=True)
class Part:
    """One of several processes, on as many machines, that prepare one dataset together: `number` from 1 to `of`."""

    number: int
    of: int

    @classmethod
    def parse(cls, text: str) -> "Part":
        """Read I/N; a ValueError for anything else."""
        match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text, re.ASCII)
        if not match or not 1 <= int(match[1]) <= int(match[2]):
            raise ValueError(f"--part {text}: must be I/N with I from 1 to N, such as 1/8")
        return cls(int(match[1]), int(match[2]))

    def owns(self, group: int) -> bool:
        """Whether a group is this part's to make."""
        return group % self.of == self.number - 1


def prepare(
    config: DataConfig,
    *,
    workers: int | None = None,
    part: Part | None = None,
    watch: Watch | None = None,
    tell: Tell | None = None,
) -> Path:
    """Make the dataset of this configuration unless it is there, and return its directory.

    `workers` processes share the work (default: one for each core this process may use); the result does not depend on
    them. With `part` only that part's share is made, for `merge` to put together. What is finished is kept when this
    process ends before all is: the same call goes on from there. The directory appears under its name only when complete;
    two processes may prepare the same one. `watch` is called as documents are written, `tell` with a line worth knowing.

    ValueError of one line: missing or empty source, a split without documents, a directory that holds something else or
    cannot be written, a full disk.
    """
    directory = prepared_directory(config)
    call = _Call(directory, len(os.sched_getaffinity(0)) if workers is None else workers, watch, tell or _ignore)
    refuse_unfit(directory)
    if is_prepared(directory, config):
        remove_leftovers(directory)
        return directory
    with in_one_line(directory):
        directory.parent.mkdir(parents=True, exist_ok=True)
        if part is not None:
            _prepare_part(config, part, call)
            return directory
        with locked(directory), lock_removed_with_all_else(directory):
            if not is_prepared(directory, config):  # another process may have made it while this one waited
                _prepare_whole(config, call)
            clean_up(directory)
    return directory


def merge(directory: Path, *, workers: int | None = None, watch: Watch | None = None, tell: Tell | None = None) -> bool:
    """Put together what parts have prepared: check that all of it is there and as it was written, and give it its name.

    May be killed and called again. False where it was done before: then nothing but the manifest is read. ValueError of
    one line where groups are missing or damaged: which parts to run again.
    """
    call = _Call(directory, len(os.sched_getaffinity(0)) if workers is None else workers, watch, tell or _ignore)
    with in_one_line(directory):
        if not workspaces_of(
            directory
        ).is_dir():  # it goes when the dataset has its name: this one is made, or was never begun
            if not exists(directory):
                raise _no_parts(directory, "nothing was prepared for it")
            read_manifest(LocalStore(directory))
            return False
        refuse_unfit(directory)
        with locked(directory):
            return _merge(call)


@dataclass(frozen=True)
class _Call:
    """Who called, and with which wishes."""

    directory: Path
    workers: int
    watch: Watch | None
    tell: Tell


@dataclass(frozen=True)
class _Planned:
    plan: Plan
    sources: Sequence[Source]
    units: Sequence[Unit]
    tokenizer: Tokenizer | None


def _prepare_whole(config: DataConfig, call: _Call) -> None:
    planned = _make_plan(config, call.tell)
    home = workspaces_of(call.directory)
    others = [path for path in inside(home) if path.name != directory_name(planned.plan)]
    if others:
        call.tell(f"{call.directory}: the source or an option has changed since this was begun: starting anew")
    for path in others:
        shutil.rmtree(path)
    workspace = Workspace(home / directory_name(planned.plan))
    workspace.make(planned.plan)
    workspace.drop_temporary()  # whoever wrote them held the lock that this process holds now: it is dead
    try:
        entry, records = _carry_out(config, planned, workspace, range(len(planned.plan.groups)), call)
    except ValueError:
        # Nothing that another start could go on from: leave nothing.
        if not inside(workspace.root / "groups") and not inside(workspace.root / "units"):
            shutil.rmtree(home)
        raise
    try:
        _finish(workspace, call.directory, planned.plan, entry, records)
    except ValueError:
        shutil.rmtree(home)  # all of it is there, and is no dataset
        raise


def _prepare_part(config: DataConfig, part: Part, call: _Call) -> None:
    planned = _make_plan(config, call.tell)
    home = workspaces_of(call.directory)
    others = [path.name for path in inside(home) if path.name != directory_name(planned.plan)]
    if others:
        raise ValueError(
            f"--part {part.number}/{part.of}: {home} was begun with another source or other options, or the source has "
            "changed since; other parts may be running: when none is, remove it and start all of them again"
        )
    workspace = Workspace(home / directory_name(planned.plan))
    workspace.make(planned.plan)
    workspace.note_parts(part.of)
    groups = [group for group in range(len(planned.plan.groups)) if part.owns(group)]
    if groups:
        _carry_out(config, planned, workspace, groups, call)
    call.tell(
        f"part {part.number} of {part.of}: {len(groups)} of {len(planned.plan.groups)} groups are there; when all parts "
        f"are done, run `lockstep data merge {call.directory}`"
    )


def _make_plan(config: DataConfig, tell: Tell) -> _Planned:
    for address, splits in config.shared_between_splits().items():
        tell(
            f"warning: source {address} is given for {' and for '.join(splits)}: the same documents are in several splits"
        )
    seen = [state_of(given) for given in config.sources]  # first: a file that comes meanwhile is a change that is told
    sources = [open_source(given) for given in config.sources]
    units = plan_units(sources)
    images = common_class_names(sources) is not None
    if not units:
        what = "images" if images else "documents"
        raise ValueError(f"source {config.source_text}: empty, there are no {what} in it; correct data.source")
    config.refuse_options_of_other_data("images" if images else "text", f"data.source={config.source_text}")
    if images:
        return _Planned(make_plan(config, sources, seen, units, None, None), sources, units, None)
    identity, tokenizer = identify_tokenizer(config.tokenizer)
    size = bpe_size(config.tokenizer) if tokenizer is None else tokenizer.vocabulary_size
    dtype: Literal["uint16", "uint32"] = "uint16" if size <= 1 << 16 else "uint32"
    return _Planned(make_plan(config, sources, seen, units, identity, dtype), sources, units, tokenizer)


def _carry_out(
    config: DataConfig, planned: _Planned, workspace: Workspace, groups: Sequence[int], call: _Call
) -> tuple[TokenizerEntry | None, dict[int, GroupRecord]]:
    """Make the groups, going on from what is there."""
    plan, entry = planned.plan, None
    with _full_disk_told(workspace, plan, planned.units, call):
        if plan.kind == "tokens":
            entry = place_tokenizer(workspace, config, planned.tokenizer, planned.sources, planned.units, call.tell)
        schedule = UnitSchedule(
            plan, planned.sources, planned.units, groups, workspace, tokenizer_hash(entry), call.watch
        )
        if schedule.found_units or schedule.found_groups:
            call.tell(
                f"{call.directory}: going on; {schedule.found_groups} of {len(groups)} groups and {schedule.found_units} "
                "units of others were finished before"
            )
        # One unit alone is done sooner here than a process is started.
        processes = 0 if schedule.units_to_do <= 1 else min(call.workers, schedule.tasks)
        work_through(schedule, _job(plan, workspace, entry), processes)
    return entry, schedule.records


def _job(plan: Plan, workspace: Workspace, entry: TokenizerEntry | None) -> Job:
    return Job(str(workspace.root.absolute()), plan.validation_fraction, plan.shard_bytes, plan.dtype, entry)


def _finish(
    workspace: Workspace,
    directory: Path,
    plan: Plan,
    entry: TokenizerEntry | None,
    records: dict[int, GroupRecord],
) -> None:
    """Write the manifest and give the dataset its name."""
    assert sorted(records) == list(range(len(plan.groups)))
    finish_dataset(workspace, plan, entry, [records[group] for group in sorted(records)])
    os.rename(workspace.dataset, directory)
    sync_directory(directory.parent)


def _merge(call: _Call) -> bool:
    directory = call.directory
    if exists(directory):
        read_manifest(LocalStore(directory))
        clean_up(directory)
        return False
    workspace, plan = _parts_of(directory)
    entry = _tokenizer_of_parts(workspace, plan)
    missing = [group for group in range(len(plan.groups)) if not workspace.group_path(group).exists()]
    _refuse_missing(workspace, directory, plan, missing, "missing")
    verification = Verification(range(len(plan.groups)))
    work_through(verification, _job(plan, workspace, entry), min(call.workers, len(plan.groups)))
    _refuse_missing(workspace, directory, plan, verification.damaged, "damaged")
    _finish(workspace, directory, plan, entry, verification.records)
    clean_up(directory)
    return True


def _parts_of(directory: Path) -> tuple[Workspace, Plan]:
    found = inside(workspaces_of(directory))
    if len(found) != 1:
        what = "nothing was prepared for it" if not found else f"{len(found)} preparations were begun, of other options"
        raise _no_parts(directory, what)
    workspace = Workspace(found[0])
    plan = workspace.plan()
    if plan is None:
        raise ValueError(f"{workspace.plan_path}: missing or damaged; run a part of it again, which restores it")
    return workspace, plan


def _no_parts(directory: Path, what: str) -> ValueError:
    return ValueError(f"{directory}: {what}; run `lockstep prepare ... --out {directory} --part I/N` first")


def _tokenizer_of_parts(workspace: Workspace, plan: Plan) -> TokenizerEntry | None:
    if plan.tokenizer_spec is None:
        return None
    entry = tokenizer_there(workspace, plan.tokenizer_spec)
    if entry is None:
        raise ValueError(f"{workspace.tokenizer_path}: missing or damaged; run a part of it again, which restores it")
    return entry


def _refuse_missing(workspace: Workspace, directory: Path, plan: Plan, groups: Sequence[int], what: str) -> None:
    if not groups:
        return
    counts = workspace.noted_parts()
    again = [
        " ".join(f"--part {number}/{of}" for number in sorted({group % of + 1 for group in groups})) for of in counts
    ]
    shown = ", ".join(map(str, groups[:8])) + (", ..." if len(groups) > 8 else "")
    raise ValueError(
        f"{directory}: {len(groups)} of {len(plan.groups)} groups are {what} ({shown}); run "
        f"{' or '.join(again) or '`lockstep prepare`'} again, then merge"
    )


@contextlib.contextmanager
def _full_disk_told(workspace: Workspace, plan: Plan, units: Sequence[Unit], call: _Call) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        written = sum(path.stat().st_size for path in workspace.root.rglob("*") if path.is_file())
        weights = [unit.weight for unit in units if unit.weight is not None]
        need = f"more than the {written} bytes written"
        if len(weights) == len(units):
            # At most a token for each byte of text; and until a group's shards are written, its units lie there too.
            most = sum(weights) * {"uint16": 2, "uint32": 4, None: 1}[plan.dtype]
            most_units = (call.workers + 1) * most // len(plan.groups)
            need = f"up to {most + min(most, most_units)} bytes"
        raise ValueError(
            f"{call.directory}: disk full after {written} bytes, {need} are needed; free some and start again, or set "
            "data.directory"
        ) from error


def _ignore(line: str) -> None:
    """For callers that need not be told."""
