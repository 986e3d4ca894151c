"""The weights of a checkpoint as other tools read them: whole tensors under plain names, in safetensors files."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from distrib.checkpoint import Checkpoint
from distrib.manifest import TEMPORARY_PREFIX, BadCheckpoint, sync_directory, write_durably
from distrib.safetensors_storage import DTYPE_NAMES, OFFSETS_KEY, SHARDING_KEY

FILE_BYTES = 5 * 10**9
"""The most bytes of tensors in a file, unless a single tensor is larger. As much is held in memory at a time."""
_PREFIX = "model."
_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


@dataclass(frozen=True)
class Exported:
    """What was written."""

    files: list[str]
    tensors: int
    bytes: int


class _Stored:
    """A tensor in a checkpoint: pieces at offsets, each in an open file, which together are the whole of it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._pieces: list[tuple[Any, list[int], list[int]]] = []
        self._dtype = torch.float32

    def add(self, file: Any, offsets: list[int]) -> None:
        piece = file.get_slice(self.name)
        self._dtype = _DTYPES[piece.get_dtype()]
        self._pieces.append((file, offsets, piece.get_shape()))

    @property
    def shape(self) -> list[int]:
        ends = [[o + s for o, s in zip(offsets, shape, strict=True)] for _, offsets, shape in self._pieces]
        return [max(sizes) for sizes in zip(*ends, strict=True)]

    @property
    def bytes(self) -> int:
        return torch.Size(self.shape).numel() * self._dtype.itemsize

    def read(self) -> torch.Tensor:
        whole = torch.empty(self.shape, dtype=self._dtype)
        if sum(torch.Size(shape).numel() for *_, shape in self._pieces) != whole.numel():
            raise BadCheckpoint(f"{self.name}: its pieces do not make the whole tensor")
        for file, offsets, shape in self._pieces:
            part = tuple(slice(o, o + s) for o, s in zip(offsets, shape, strict=True))
            whole[part] = file.get_tensor(self.name)
        return whole


def refuse_occupied(out: Path) -> None:
    """Raises ValueError where something lies at `out` that is no empty directory."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out {out}: is there already; name a directory that is not")


def export_weights(checkpoint: Checkpoint, out: Path, file_bytes: int = FILE_BYTES) -> Exported:
    """Writes the weights and buffers of a verified checkpoint into the directory `out`: model.safetensors, or several files
    and model.safetensors.index.json, as Hugging Face's tools expect. A tied tensor is there once, under its first name.

    Raises ValueError, and leaves nothing, where `out` is occupied or cannot be written.
    """
    refuse_occupied(out)
    temporary = out.absolute().with_name(f"{TEMPORARY_PREFIX}{out.name}-{uuid.uuid4().hex[:12]}")
    try:
        temporary.mkdir(parents=True)
        with contextlib.ExitStack() as stack:
            exported = _write(temporary, _stored_weights(checkpoint, stack), file_bytes)
        sync_directory(temporary)
        temporary.rename(out)
        sync_directory(out.absolute().parent)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"--out {out}: cannot be written ({error}); choose a place with room") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return exported


def _stored_weights(checkpoint: Checkpoint, stack: contextlib.ExitStack) -> list[_Stored]:
    """The model's tensors by name, their files open as long as `stack`."""
    found: dict[str, _Stored] = {}
    for file_name in sorted(checkpoint.manifest["files"]):
        if not file_name.startswith("model-"):
            continue
        file = stack.enter_context(safe_open(checkpoint.path / file_name, framework="pt"))
        places = json.loads(file.metadata()[SHARDING_KEY])
        for name in file.keys():  # noqa: SIM118  (no mapping: it has no other iterator)
            found.setdefault(name, _Stored(name)).add(file, places[name][OFFSETS_KEY])
    return [found[name] for name in sorted(found)]


def _write(directory: Path, tensors: list[_Stored], file_bytes: int) -> Exported:
    groups = _share_out(tensors, file_bytes)
    files: list[str] = []
    weight_map: dict[str, str] = {}
    for number, group in enumerate(groups, start=1):
        part = f"-{number:05d}-of-{len(groups):05d}" if len(groups) > 1 else ""
        files.append(f"model{part}.safetensors")
        weights = {tensor.name.removeprefix(_PREFIX): tensor.read() for tensor in group}
        save_file(weights, directory / files[-1], metadata={"format": "pt"})
        # The library makes files that only their owner may read, whatever the umask says.
        (directory / files[-1]).chmod(directory.stat().st_mode & 0o666)
        with (directory / files[-1]).open("rb") as file:
            os.fsync(file.fileno())
        weight_map |= dict.fromkeys(weights, files[-1])
    total = sum(tensor.bytes for tensor in tensors)
    if len(groups) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_durably(directory / "model.safetensors.index.json", json.dumps(index, indent=2, sort_keys=True).encode())
    return Exported(files, len(tensors), total)


def _share_out(tensors: list[_Stored], file_bytes: int) -> list[list[_Stored]]:
    """The tensors of each file, in order."""
    groups: list[list[_Stored]] = [[]]
    filled = 0
    for tensor in tensors:
        if groups[-1] and filled + tensor.bytes > file_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(tensor)
        filled += tensor.bytes
    return groups
