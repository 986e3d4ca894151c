"""Safetensors as the storage of `torch.distributed.checkpoint`: hashed while written, the same bytes every time.

PyTorch's own `HuggingFaceStorageWriter` writes its metadata in an order that changes from process to process and builds
each file in memory; its reader is used as it is.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

# How PyTorch's reader learns where a piece lies in the full tensor: JSON in the file's metadata, offsets by name.
SHARDING_KEY = "DCP_SHARDING_INFO"
OFFSETS_KEY = "saved_offsets"
DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class SafetensorsWriter(StorageWriter):
    """Each rank writes its tensors to `{group}-{rank + 1:05d}.safetensors`, where `group` is the first part of the names.

    `files`: name -> {"sha256", "bytes"} of what this rank wrote.
    """

    def __init__(self, directory: Path) -> None:
        super().__init__()
        self.directory = directory
        self.files: dict[str, dict[str, Any]] = {}

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        self.files = {}

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return [dataclasses.replace(plan, storage_data=index) for index, plan in enumerate(plans, start=1)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        groups: dict[str, list[WriteItem]] = {}
        for item in plan.items:
            assert item.type != WriteItemType.BYTE_IO, f"{item.index.fqn} is not a tensor"
            groups.setdefault(item.index.fqn.split(".", 1)[0], []).append(item)
        results: list[WriteResult] = []
        for group in sorted(groups):
            name = f"{group}-{plan.storage_data:05d}.safetensors"
            items = sorted(groups[group], key=lambda item: item.index.fqn)
            self.files[name] = _write_file(self.directory / name, items, planner)
            results += [WriteResult(item.index, _item_bytes(item), name) for item in items]
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        pass

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True

    def storage_meta(self) -> StorageMeta | None:
        return None


def _write_file(path: Path, items: list[WriteItem], planner: SavePlanner) -> dict[str, Any]:
    """Writes one file as https://huggingface.co/docs/safetensors specifies: header size, JSON header, tensors. One tensor
    at a time is copied to the host."""
    header: dict[str, Any] = {}
    chunks: dict[str, Any] = {}
    offset = 0
    for item in items:
        assert item.tensor_data is not None
        size = _item_bytes(item)
        header[item.index.fqn] = {
            "dtype": DTYPE_NAMES[item.tensor_data.properties.dtype],
            "shape": list(item.tensor_data.chunk.sizes),
            "data_offsets": [offset, offset + size],
        }
        chunks[item.index.fqn] = {OFFSETS_KEY: list(item.tensor_data.chunk.offsets)}
        offset += size
    header["__metadata__"] = {SHARDING_KEY: json.dumps(chunks, sort_keys=True)}
    encoded = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    digest = hashlib.sha256()
    written = 0
    with path.open("wb") as file:

        def write(block: bytes | memoryview) -> None:
            nonlocal written
            digest.update(block)
            file.write(block)
            written += len(block)

        write(len(encoded).to_bytes(8, "little"))
        write(encoded)
        for item in items:
            tensor = planner.resolve_data(item)
            assert isinstance(tensor, torch.Tensor)
            flat = tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8)
            write(flat.numpy().data)
        file.flush()
        os.fsync(file.fileno())
    assert written == 8 + len(encoded) + offset
    return {"sha256": digest.hexdigest(), "bytes": written}


def _item_bytes(item: WriteItem) -> int:
    assert item.tensor_data is not None
    return item.tensor_data.chunk.sizes.numel() * item.tensor_data.properties.dtype.itemsize
