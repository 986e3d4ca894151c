"""Exported weights: whatever saved them, Hugging Face's own loader puts every one of them into a plain model."""

from __future__ import annotations

import json
import resource
import signal
from pathlib import Path

import pytest
import torch
from huggingface_hub import load_torch_model
from safetensors import safe_open
from torch import nn

from distrib.checkpoint import Checkpoint, open_checkpoint, save_checkpoint
from distrib.config import CheckpointConfig
from distrib.engine import CanonicalState
from distrib.export import export_weights
from distrib.manifest import BadCheckpoint, write_manifest
from distrib.model_state import model_tensors
from distrib.world import single_process_world
from models.build import build_model
from tests.distrib.engine_runs import MODEL, SHAPE
from tests.distrib.test_sharding import _save_after, whole_tensors
from tests.worker_pool import WorkerPool

ALONE = single_process_world("cpu")


def saved(root: Path, tensors: dict[str, torch.Tensor]) -> Checkpoint:
    state = CanonicalState(tensors, {})
    path = save_checkpoint(root, state, step=3, scalars={}, fields={}, config=CheckpointConfig(), world=ALONE)
    return open_checkpoint(path, ALONE)


@pytest.mark.parametrize(
    ("world_size", "zero_stage", "replicas"),
    [
        (1, 0, 1),
        pytest.param(2, 0, 1, marks=pytest.mark.long),
        (3, 3, 1),
        pytest.param(4, 2, 2, marks=pytest.mark.long),
    ],
)
@pytest.mark.parametrize("file_bytes", [10**9, 20_000])
def test_a_plain_model_loads_what_any_layout_saved(
    gloo_pool: WorkerPool, tmp_path: Path, world_size: int, zero_stage: int, replicas: int, file_bytes: int
) -> None:
    gloo_pool.run(_save_after, world_size, zero_stage, replicas, str(tmp_path), 3)
    checkpoint = open_checkpoint(tmp_path / "step-00000003", ALONE)
    exported = export_weights(checkpoint, tmp_path / "out", file_bytes)
    model = build_model(MODEL, SHAPE)
    for parameter in model.parameters():
        nn.init.constant_(parameter, float("nan"))
    load_torch_model(model, tmp_path / "out", strict=True)
    expected = {name: t for name, t in whole_tensors(tmp_path).items() if name.startswith("model.")}
    loaded = model_tensors(model)
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)

    total = sum(tensor.nbytes for tensor in expected.values())
    assert (exported.tensors, exported.bytes) == (len(expected), total)
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    if file_bytes > total:
        assert names == exported.files == ["model.safetensors"]
    else:
        count = len(exported.files)
        assert count > 2
        assert names == sorted([*exported.files, "model.safetensors.index.json"])
        assert exported.files == [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
        index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
        assert index["metadata"] == {"total_size": total}
        assert {f"model.{name}" for name in index["weight_map"]} == expected.keys()
    for name in exported.files:
        assert (tmp_path / "out" / name).stat().st_mode == (checkpoint.path / "state.json").stat().st_mode
        with safe_open(tmp_path / "out" / name, framework="pt") as file:
            assert file.metadata() == {"format": "pt"}
            held = {key: file.get_tensor(key).nbytes for key in file.keys()}  # noqa: SIM118
        assert len(held) == 1 or sum(held.values()) <= file_bytes


def test_a_tied_tensor_is_there_once_and_buffers_are_there(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.output = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
            self.output.weight = self.embedding.weight
            self.norm = nn.BatchNorm1d(4, dtype=torch.bfloat16)

    model = Tied()
    export_weights(saved(tmp_path, model_tensors(model)), tmp_path / "out")
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
        found = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    assert found.keys() == {"embedding.weight", *(f"norm.{name}" for name in model.norm.state_dict())}
    assert found["norm.weight"].dtype == torch.bfloat16
    assert found["norm.num_batches_tracked"].shape == ()
    assert torch.equal(found["embedding.weight"], model.output.weight)


def test_nothing_is_overwritten_and_nothing_half_done_is_left(tmp_path: Path) -> None:
    checkpoint = saved(tmp_path / "root", {"model.w": torch.zeros(100_000)})
    occupied = tmp_path / "occupied"
    occupied.mkdir()
    (occupied / "notes.txt").write_text("mine")
    for out in (occupied, occupied / "notes.txt"):
        with pytest.raises(ValueError, match="is there already"):
            export_weights(checkpoint, out)
    assert [path.read_text() for path in occupied.iterdir()] == ["mine"]

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(ValueError, match="out: cannot be written"):
            export_weights(checkpoint, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["occupied", "root"]
    (tmp_path / "out").mkdir()
    export_weights(checkpoint, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model.safetensors"]


def test_a_piece_that_no_file_holds_is_noticed(gloo_pool: WorkerPool, tmp_path: Path) -> None:
    """Though every file that the manifest lists verifies."""
    gloo_pool.run(_save_after, 2, 3, 1, str(tmp_path), 3)
    path = tmp_path / "step-00000003"
    (path / "model-00001.safetensors").unlink()
    manifest = json.loads((path / "MANIFEST.json").read_bytes())
    files = {name: record for name, record in manifest["files"].items() if name != "model-00001.safetensors"}
    write_manifest(path, {"step": 3}, files)
    with pytest.raises(BadCheckpoint, match="its pieces do not make the whole tensor"):
        export_weights(open_checkpoint(path, ALONE), tmp_path / "out")
    assert not (tmp_path / "out").exists()
