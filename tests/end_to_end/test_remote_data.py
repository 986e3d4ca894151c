"""Training from an address: the same run as from the directory, through a cache of a few shards."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from data.config import DataConfig
from data.prepare import prepare
from tests.data.faulty_server import Fault, FaultyServer, serving
from tests.end_to_end.runs import (
    LOCKSTEP,
    Result,
    WarmProcess,
    environment,
    history,
    lockstep,
    side_by_side,
    tiny_gpt,
    write_corpus,
    write_recipe,
)

SHARD_BYTES = 1500
WINDOWS = {"order": "windowed", "lanes": 2, "window_shards": 2}
PAGE_BYTES = 4096
"""What a small file takes of a disk in memory."""
DISK_PAGES = 160
"""More than the files that a run has open, which take room even when they have been evicted."""


@pytest.fixture(scope="module")
def sharded(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A dataset of many small shards, and the values of a recipe that reads it from its directory."""
    directory = tmp_path_factory.mktemp("sharded") / "dataset"
    values = tiny_gpt(directory, corpus, data={"shard_bytes": SHARD_BYTES, **WINDOWS})
    prepare(DataConfig.model_validate(values["data"]))
    assert len(list(directory.glob("train-*.bin"))) > 12
    return directory, values


@pytest.fixture
def server(sharded: tuple[Path, dict[str, Any]]) -> Iterator[FaultyServer]:
    with serving(sharded[0]) as server:
        yield server


def remote_recipe(path: Path, values: dict[str, Any], address: str, cache: Path, **changes: object) -> Path:
    data = {
        **values["data"],
        "directory": address,
        "cache_directory": str(cache),
        "download_pause_seconds": 0.01,
        **changes,
    }
    return write_recipe(path, {**values, "data": data})


@pytest.mark.long
def test_a_run_from_an_address_is_the_run_from_the_directory(
    sharded: tuple[Path, dict[str, Any]], server: FaultyServer, warm: WarmProcess, tmp_path: Path
) -> None:
    dataset, values = sharded
    local = write_recipe(tmp_path / "local.yaml", values)
    lockstep("train", local, "run.directory=local", "--workers", 2, cwd=tmp_path).succeeded()
    cache = tmp_path / "cache"
    sizes = [path.stat().st_size for path in dataset.glob("train-*")]
    limit = sum(sizes) // 3
    for number in (0, 2, 5):
        server.faults[f"train-{number:05d}.bin"] = [Fault("reset", 700), Fault("flip", 9), Fault("status")]
    recipe = remote_recipe(tmp_path / "r.yaml", values, server.address, cache, cache_bytes=limit)
    lockstep("train", recipe, "run.directory=run", "--workers", 2, cwd=tmp_path).succeeded()
    assert history(tmp_path / "run") == history(tmp_path / "local")
    assert 0 < sum(path.stat().st_size for path in (cache / "files").iterdir()) <= limit
    identity = json.loads((tmp_path / "run" / "run.json").read_text())
    assert identity["attempts"][-1]["datasets"][""]["directory"] == server.address
    told = warm.lockstep("evaluate", "run", cwd=tmp_path).succeeded().out
    assert told == warm.lockstep("evaluate", "run", "--dataset", dataset, cwd=tmp_path).succeeded().out
    assert "proven: steps 1 to 40 read" in warm.lockstep("data", "audit", "run", cwd=tmp_path).succeeded().out
    shown = warm.lockstep("data", "order", "run", "--step", 7, "--decode", cwd=tmp_path).succeeded().out
    assert shown == warm.lockstep("data", "order", "local", "--step", 7, "--decode", cwd=tmp_path).succeeded().out
    home = environment(XDG_CACHE_HOME=str(tmp_path / "home"))
    assert f"{server.address}: good; " in warm.lockstep("data", "verify", server.address, cwd=tmp_path, env=home).out
    there = warm.lockstep("data", "info", server.address, cwd=tmp_path, env=home).succeeded().out
    assert there == warm.lockstep("data", "info", dataset, cwd=tmp_path).succeeded().out


@pytest.mark.long
def test_two_runs_at_once_over_one_cache_that_holds_neithers_data(
    sharded: tuple[Path, dict[str, Any]], server: FaultyServer, warm: WarmProcess, tmp_path: Path
) -> None:
    dataset, values = sharded
    cache = tmp_path / "cache"
    limit = sum(path.stat().st_size for path in dataset.glob("train-*")) // 3
    local = write_recipe(tmp_path / "local.yaml", values)
    remote = remote_recipe(tmp_path / "r.yaml", values, server.address, cache, cache_bytes=limit)
    commands = [
        [LOCKSTEP, "train", remote, f"run.directory=run-{seed}", f"run.seed={seed}", "--workers", 1] for seed in (1, 2)
    ]
    for ended in side_by_side(commands, cwd=tmp_path, envs=[environment(), environment()]):
        ended.succeeded()
    for seed in (1, 2):
        warm.worker(local, f"run.directory=local-{seed}", f"run.seed={seed}", cwd=tmp_path).succeeded()
        assert history(tmp_path / f"run-{seed}") == history(tmp_path / f"local-{seed}")
    assert 0 < sum(path.stat().st_size for path in (cache / "files").iterdir()) <= limit
    assert list((cache / "partial").iterdir()) == []


@pytest.mark.long
@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk takes root")
def test_a_cache_on_a_disk_that_is_too_small_for_its_limit(warm: WarmProcess, tmp_path: Path) -> None:
    """What the disk does not take makes room for what is needed first; on one that others have filled no run begins."""
    corpus, disk = write_corpus(tmp_path / "corpus", documents=200), tmp_path / "disk"
    values = tiny_gpt(tmp_path / "dataset", corpus, run={"steps": 80}, data={"shard_bytes": SHARD_BYTES, **WINDOWS})
    dataset = prepare(DataConfig.model_validate(values["data"]))
    disk.mkdir()
    size = f"size={DISK_PAGES * PAGE_BYTES}"
    if subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("this machine does not let tests mount a small disk")
    try:
        local = write_recipe(tmp_path / "local.yaml", values)
        warm.worker(local, "run.directory=local", cwd=tmp_path).succeeded()
        with serving(dataset) as server:
            recipe = remote_recipe(tmp_path / "r.yaml", values, server.address, disk / "cache")
            train = ("train", recipe, "--workers", 1)
            lockstep(*train, "run.directory=run", cwd=tmp_path).succeeded()
            assert history(tmp_path / "run") == history(tmp_path / "local")
            assert len([name for name in server.requests if name.startswith("train-")]) > DISK_PAGES
            shutil.rmtree(disk / "cache")
            with (disk / "thesis").open("wb", buffering=0) as file, contextlib.suppress(OSError):
                while True:
                    file.write(bytes(PAGE_BYTES))
            refused = lockstep(*train, "run.directory=full", cwd=tmp_path)
            refused.failed_with(2, "data.cache_directory: its disk has room for", "free some")
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def error_of(ended: Result) -> str:
    """Why it ended: threads that fetch ahead may warn before that and after it."""
    [error] = [line for line in ended.told if line.startswith("lockstep: error: ")]
    return error


def test_what_is_wrong_is_told_in_a_line(
    sharded: tuple[Path, dict[str, Any]], server: FaultyServer, warm: WarmProcess, tmp_path: Path
) -> None:
    values, cache = sharded[1], tmp_path / "cache"

    def train(address: str, *overrides: str, **changes: object) -> Any:
        recipe = remote_recipe(tmp_path / "r.yaml", values, address, cache, download_retries=1, **changes)
        return warm.worker(recipe, "run.directory=run", *overrides, cwd=tmp_path)

    train(f"{server.address}/nowhere").failed_with(2, "/nowhere: no manifest.json: not a prepared dataset")
    train(server.address, tokenizer="bpe:300").failed_with(2, "prepared with data.tokenizer 'bytes'", "'bpe:300'")
    train("http://127.0.0.1:9").failed_with(
        2, "http://127.0.0.1:9/manifest.json: cannot be read", "is the server there"
    )
    told = train("http://me:hunter2@127.0.0.1:9").failed_with(2, "the http address holds a user's name or password")
    assert "hunter2" not in told
    train("nosuch://place").failed_with(2, "nosuch://place", "Protocol not known")
    train(server.address, cache_bytes=100).failed_with(2, "data.cache_bytes 100")
    train("s3://bucket/x?token=hunter2").failed_with(2, "the s3 address holds a query")
    assert not (tmp_path / "run").exists()
    server.always["train-00000_001.bin"] = Fault("flip", 3)
    ended = train(server.address)
    assert ended.code == 78
    assert "train-00000_001.bin: fetched 3 times, and never what the manifest lists" in error_of(ended)
    server.always["train-00000_001.bin"] = Fault("status", status=503)
    ended = train(server.address, "run.directory=other")
    assert ended.code == 1
    assert "train-00000_001.bin: cannot be read (ClientResponseError: 503" in error_of(ended)
    no_directory = tmp_path / "file"
    no_directory.write_text("")
    third = "run.directory=third"
    train(server.address, third, cache_directory=str(no_directory)).failed_with(
        2, "Not a directory; set data.cache_dir"
    )
    train(server.address, third, cache_bytes=6000).failed_with(
        2, "data.cache_bytes 6000: too small for data.order=windowed"
    )
