"""Saving beside training: the step goes on, what is written is the state of the save's own step, and failures are told."""

from __future__ import annotations

import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor

import distrib.saving
from distrib import phases
from distrib.checkpoint import open_checkpoint, save_checkpoint
from distrib.config import CheckpointConfig
from distrib.engine import CanonicalState
from distrib.manifest import published_checkpoints
from distrib.native import NativeEngine
from distrib.phases import Moment
from distrib.saving import SaveOutcome, Saver, Snapshot
from distrib.sharding import local
from distrib.world import World, single_process_world
from tests.distrib.engine_runs import ADAMW_CLIPPED, make_engine, take_step
from tests.distrib.test_checkpoint import kill_again_and_again
from tests.distrib.test_sharding import mesh_of
from tests.worker_pool import WorkerPool

ALONE = single_process_world("cpu")
# Written, hashed and flushed to the disk in far more time than some steps of the tiny model take.
LARGE_ELEMENTS = 1 << 25


def saver_of(world: World, asynchronous: bool = True, outcomes: list[SaveOutcome] | None = None) -> Saver:
    config = CheckpointConfig(asynchronous=asynchronous)
    return Saver(world, config, (outcomes if outcomes is not None else []).append)


def begin(saver: Saver, engine: NativeEngine, root: Path, step: int, **extra: torch.Tensor) -> None:
    state = engine.canonical_state()
    tensors = {**state.tensors, **{f"extra.{name}": tensor for name, tensor in extra.items()}}
    saver.begin(
        root,
        CanonicalState(tensors, state.scalars),
        step=step,
        scalars={"ledger": {"step": step}},
        fields={"world": engine.world.size, "engine": "native"},
    )


@contextmanager
def held_writing() -> Iterator[threading.Event]:
    """No save of this process is written before the event is set."""
    may_write = threading.Event()

    def write_once_allowed(*arguments: Any, **keywords: Any) -> Path:
        assert may_write.wait(60)
        return save_checkpoint(*arguments, **keywords)

    distrib.saving.save_checkpoint = write_once_allowed  # type: ignore[assignment]
    try:
        yield may_write
    finally:
        may_write.set()
        distrib.saving.save_checkpoint = save_checkpoint


def _save_both_ways(world: World, zero_stage: int, root: str) -> tuple[list[str | None], bool]:
    """Two saves while training waits, and the same two beside training, held back until later steps are done."""
    world = mesh_of(world, zero_stage)
    engine = make_engine(world, ADAMW_CLIPPED, zero_stage=zero_stage)
    failures = []
    for asynchronous in (False, True):
        engine = make_engine(world, ADAMW_CLIPPED, zero_stage=zero_stage)
        saver = saver_of(world, asynchronous)
        for step in range(6):
            take_step(engine, step, 7)
            if step in (1, 3):
                with held_writing() as may_write:
                    if not asynchronous:
                        may_write.set()
                    begin(saver, engine, Path(root) / str(asynchronous), step)
                    take_step(engine, step + 100, 7)
                outcome = saver.finish()
                assert outcome is not None
                assert outcome.step == step
                failures.append(outcome.failure)
    later_steps_change_all = not any(torch.equal(*pair) for pair in _kept_and_live(engine))
    return failures, later_steps_change_all


def _kept_and_live(engine: NativeEngine) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Every weight as a snapshot keeps it while a step is taken, and as it is after that step."""
    snapshot = Snapshot().take(engine.canonical_state())
    take_step(engine, 50, 7)
    live = engine.canonical_state().tensors
    names = [name for name in live if name.startswith("model.") and local(live[name]).numel()]
    return [(local(snapshot.tensors[name]), local(live[name])) for name in names]


@pytest.mark.parametrize(("world_size", "zero_stage"), [(1, 0), (2, 0), (2, 3)])
def test_what_is_saved_beside_training_is_what_waiting_would_save(
    gloo_pool: WorkerPool, tmp_path: Path, world_size: int, zero_stage: int
) -> None:
    """The same files with the same bytes, manifests too, though training was steps ahead when they were written."""
    for failures, later_steps_change_all in gloo_pool.run(_save_both_ways, world_size, zero_stage, str(tmp_path)):
        assert failures == [None] * 4
        assert later_steps_change_all
    for step in (1, 3):
        waited, beside = (tmp_path / mode / f"step-{step:08d}" for mode in ("False", "True"))
        names = sorted(path.name for path in waited.iterdir())
        assert "MANIFEST.json" in names
        assert len([name for name in names if name.startswith("optimizer-")]) == world_size
        assert sorted(path.name for path in beside.iterdir()) == names
        assert all((beside / name).read_bytes() == (waited / name).read_bytes() for name in names)


def test_steps_are_taken_while_files_are_written(tmp_path: Path) -> None:
    """Nothing holds the writer but its own work: 128 MiB to be hashed and flushed."""
    engine = make_engine(ALONE, ADAMW_CLIPPED)
    outcomes: list[SaveOutcome] = []
    saver = saver_of(ALONE, True, outcomes)
    large = torch.zeros(LARGE_ELEMENTS)
    steps, stall_seconds = list[int](), list[float]()
    # What else runs here can only take steps away, and make a stall longer: where it did, another save is looked at.
    for save in range(1, 21):
        begun = time.perf_counter()
        begin(saver, engine, tmp_path, save, large=large)
        stall_seconds.append(time.perf_counter() - begun)
        large.fill_(-1.0)  # what comes after the snapshot must not enter it
        written_meanwhile = 0
        while len(outcomes) < save:
            take_step(engine, save * 1000 + written_meanwhile, 7)
            written_meanwhile += 1
        steps.append(written_meanwhile)
        large.zero_()
        saver.finish()
        goes_on = max(steps) >= 3
        # From the second one on the memory of the copy is there already.
        stalls_little = save > 1 and min(stall_seconds[1:]) < min(outcome.seconds for outcome in outcomes) / 2
        if goes_on and stalls_little:
            break
    assert [(outcome.step, outcome.failure) for outcome in outcomes] == [(step, None) for step in range(1, save + 1)]
    assert goes_on, "training must go on during a save"
    assert stalls_little, stall_seconds
    for path in published_checkpoints(tmp_path):
        open_checkpoint(path, ALONE)
        with (path / "extra-00001.safetensors").open("rb") as file:
            file.seek(-(1 << 20), 2)
            assert not any(file.read())


def _snapshot_twice(world: World) -> tuple[bool, bool, bool]:
    world = mesh_of(world, 3)
    engine = make_engine(world, ADAMW_CLIPPED, zero_stage=3)
    snapshot = Snapshot()
    state = engine.canonical_state()
    first = dict(snapshot.take(state).tensors)
    addresses = {name: local(tensor).data_ptr() for name, tensor in first.items()}
    take_step(engine, 0, 7)
    second = snapshot.take(engine.canonical_state()).tensors
    same_memory = {name: local(tensor).data_ptr() for name, tensor in second.items()} == addresses
    sharded_alike = all(
        isinstance(second[name], DTensor)
        and (second[name].placements, second[name].shape) == (tensor.placements, tensor.shape)  # type: ignore[attr-defined]
        for name, tensor in state.tensors.items()
        if isinstance(tensor, DTensor)
    )
    up_to_date = all(torch.equal(local(second[n]), local(t)) for n, t in engine.canonical_state().tensors.items())
    return same_memory, sharded_alike, up_to_date


def test_a_snapshot_keeps_its_memory_and_the_sharding(gloo_pool: WorkerPool) -> None:
    assert gloo_pool.run(_snapshot_twice, 2) == [(True, True, True)] * 2


def _copy_from_another_device(world: World) -> list[tuple[str, str]]:
    """The meta device stands for a GPU: a copy in host memory of what lies on another device than the mesh's."""
    engine = make_engine(mesh_of(world, 3), ADAMW_CLIPPED, zero_stage=3)
    weight = next(t for t in engine.canonical_state().tensors.values() if isinstance(t, DTensor))
    elsewhere = torch.empty_like(weight, device="meta")
    buffer = Snapshot()._buffer("weight", elsewhere)
    return [(type(tensor).__name__, local(tensor).device.type) for tensor in (elsewhere, buffer)]


def test_a_snapshot_of_a_device_lies_in_host_memory(gloo_pool: WorkerPool) -> None:
    for found in gloo_pool.run(_copy_from_another_device, 2):
        assert found == [("DTensor", "meta"), ("DTensor", "cpu")]


def test_a_changed_tensor_gets_new_memory() -> None:
    snapshot = Snapshot()
    for tensor in (torch.ones(3), torch.ones(4), torch.ones(4, dtype=torch.float64)):
        kept = snapshot.take(CanonicalState({"model.w": tensor}, {})).tensors
        assert kept["model.w"].dtype == tensor.dtype
        assert torch.equal(kept["model.w"], tensor)
    assert set(snapshot.take(CanonicalState({"model.v": tensor}, {})).tensors) == {"model.v"}


def _save_without_room(world: World, asynchronous: bool, root: str) -> list[tuple[int, str | None]]:
    """The second of three saves finds no room, on the last rank alone."""
    engine = make_engine(world, ADAMW_CLIPPED)
    told: list[SaveOutcome] = []
    saver = saver_of(world, asynchronous, told)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    for step in (1, 2, 3):
        if step == 2 and world.rank == world.size - 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
        try:
            begin(saver, engine, Path(root), step)
            take_step(engine, step, 7)
            outcome = saver.finish()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert outcome == told[-1]
    assert saver.finish() is None
    return [(outcome.step, outcome.failure) for outcome in told]


@pytest.mark.parametrize("asynchronous", [True, False])
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_failed_save_is_told_on_every_rank_and_the_next_one_works(
    gloo_pool: WorkerPool, tmp_path: Path, world_size: int, asynchronous: bool
) -> None:
    for told in gloo_pool.run(_save_without_room, world_size, asynchronous, str(tmp_path)):
        (_, first), (_, second), (_, third) = told
        assert [step for step, _ in told] == [1, 2, 3]
        assert (first, third) == (None, None)
        assert second is not None
        assert "no room for a checkpoint" in second
        assert "\n" not in second
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001", "step-00000003"]


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_mistake_in_the_saving_thread_is_raised_where_training_waits(tmp_path: Path, asynchronous: bool) -> None:
    def fail(outcome: SaveOutcome) -> None:
        raise ArithmeticError(f"at step {outcome.step}")

    saver = Saver(ALONE, CheckpointConfig(asynchronous=asynchronous), fail)
    begin(saver, make_engine(ALONE, ADAMW_CLIPPED), tmp_path, 1)
    with pytest.raises(ArithmeticError, match="at step 1"):
        saver.finish()
    assert saver.abandon(0.0)


_SAVE_WITHOUT_MEMORY_FOR_A_THREAD = """
import sys
from tests.distrib.test_saving import *

engine, waiting, beside = make_engine(ALONE, ADAMW_CLIPPED), saver_of(ALONE, False), saver_of(ALONE)
for step, saver in ((1, waiting), (2, beside)):
    begin(saver, engine, Path(sys.argv[1]), step)
    assert saver.finish().failure is None
    # From here on there is room for some objects, and for no thread's stack.
    used_bytes = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used_bytes + (4 << 20), -1))
try:
    threading.Thread(target=print).start()
except RuntimeError as error:
    print(error)
"""


def test_a_save_needs_no_memory_for_another_thread(tmp_path: Path) -> None:
    """Where there is some but not enough of it, Python waits for ever for a thread that it begins."""
    done = subprocess.run(
        [sys.executable, "-c", _SAVE_WITHOUT_MEMORY_FOR_A_THREAD, str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert done.stdout == "can't start new thread\n"
    assert len(published_checkpoints(tmp_path)) == 2


def test_the_saving_thread_ends_with_its_saver(tmp_path: Path) -> None:
    before = set(threading.enumerate())
    saver = saver_of(ALONE)
    begin(saver, make_engine(ALONE, ADAMW_CLIPPED), tmp_path, 1)
    saver.finish()
    (thread,) = set(threading.enumerate()) - before
    del saver
    thread.join(60)
    assert not thread.is_alive()


def test_a_failing_run_waits_for_a_save_only_so_long(tmp_path: Path) -> None:
    saver = saver_of(ALONE)
    assert saver.abandon(0.0), "nothing is in flight"
    with held_writing() as may_write:
        begin(saver, make_engine(ALONE, ADAMW_CLIPPED), tmp_path, 1)
        assert not saver.abandon(0.05)
        assert published_checkpoints(tmp_path) == []
        may_write.set()
        assert saver.abandon(60.0)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_a_save_is_over_once_its_thread_has_said_that_it_is_idle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever waits for it may end the process at once, and what its thread was still about to say would be lost."""
    says_it, may_go_on = threading.Event(), threading.Event()

    def hear(moment: Moment) -> None:
        if moment.phase == "idle":
            says_it.set()
            may_go_on.wait(60)

    monkeypatch.setattr(phases, "_observers", [hear])
    saver = saver_of(ALONE)
    begin(saver, make_engine(ALONE, ADAMW_CLIPPED), tmp_path, 1)
    assert says_it.wait(60)
    assert not saver.abandon(0.05)
    may_go_on.set()
    assert saver.abandon(60.0)


@pytest.mark.long
def test_a_kill_at_any_moment_beside_training_never_shows_a_half_checkpoint(tmp_path: Path) -> None:
    script = (
        "import sys; from tests.distrib.test_saving import *; root = Path(sys.argv[1])\n"
        "engine = make_engine(ALONE, ADAMW_CLIPPED); saver = saver_of(ALONE); print('ready', flush=True)\n"
        "for step in range(int(sys.argv[2]), 10**6):\n"
        "    begin(saver, engine, root, step); take_step(engine, step, 7); saver.finish()"
    )
    kill_again_and_again(script, tmp_path)
