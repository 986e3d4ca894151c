"""The environments and corpora that `loaders.py` needs, made once below its cache directory."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import sysconfig
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.loader_lockstep import BATCH_SAMPLES, SEQUENCE_TOKENS, prepare_corpus, write_blocks

ROOT = Path(__file__).parents[1]
FORMATS = Path(__file__).with_name("loader_formats.py")
INSTALL_TIMEOUT_SECONDS = 900
DEBIAN_SOURCE = "linux-source-6.1"  # 1.3 GB of GPL-2 text: measured on, never kept in the repository

# What is installed with what, in turn. litdata and mosaicml-streaming ask for torchvision, of which there is no CPU build
# for this torch: a normal install would bring CUDA. Their other requirements are named here.
STEPS: dict[str, list[list[str]]] = {
    "peers": [
        ["torch", "numpy"],
        ["grain", "array_record", "webdataset", "torchdata", "datasets", "pillow"],
        ["--no-deps", "litdata"],
        ["lightning-utilities", "boto3", "tifffile", "obstore"],
    ],
    # mosaicml-streaming 0.13 cannot be installed beside datasets 5: it needs an older transformers and numpy.
    "mds": [
        ["torch", "numpy<2.2", "datasets<5", "transformers<5", "pillow"],
        ["--no-deps", "mosaicml-streaming"],
        ["numpy<2.2", "Brotli", "boto3", "azure-identity", "azure-storage-blob", "azure-storage-file-datalake"],
        ["numpy<2.2", "matplotlib<4", "paramiko<4", "python-snappy<1", "zstd<2", "google-cloud-storage<3.3", "oci<3"],
        ["catalogue<3"],
    ],
}
# The project's own pins of these hold; all pins at once would keep pip searching for minutes.
PINNED = {"peers": ("torch", "numpy", "pillow", "pyarrow", "datasets", "fsspec"), "mds": ("torch", "pillow")}
TORCHVISION_STUB = {
    "torchvision/__init__.py": "",
    "torchvision/datasets.py": "class VisionDataset: ...\n",
    "torchvision/transforms/__init__.py": "",
    "torchvision/transforms/functional.py": "def to_tensor(picture): raise NotImplementedError\n",
}


def make_environment(name: str, cache: Path) -> Path:
    """The interpreter of an environment, installed unless it is there already; RuntimeError of one line if it cannot be."""
    folder = cache / f"venv-{name}"
    python, ready = folder / "bin" / "python", folder / ".ready"
    pins = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.split("==")[0] in PINNED[name]]
    recipe = hashlib.sha256(json.dumps([STEPS[name], pins]).encode()).hexdigest()
    if ready.exists() and ready.read_text() == recipe:
        return python
    print(f"installing environment {name} (once; some minutes)", file=sys.stderr, flush=True)
    cache.mkdir(parents=True, exist_ok=True)
    constraints = cache / f"constraints-{name}.txt"
    constraints.write_text("\n".join(pins) + "\n")
    _run([sys.executable, "-m", "venv", "--clear", str(folder)])
    for packages in STEPS[name]:
        _run([str(python), "-m", "pip", "install", "--quiet", "--constraint", str(constraints), *packages])
    if name == "mds":
        for path, text in TORCHVISION_STUB.items():
            file = next(folder.glob("lib/python*/site-packages")) / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
    ready.write_text(recipe)
    return python


def _run(command: list[str]) -> None:
    try:
        finished = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"{' '.join(command[1:])[:120]}: not done in {INSTALL_TIMEOUT_SECONDS} s") from None
    if finished.returncode != 0:
        lines = [line for line in finished.stderr.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("ERROR") or "Error" in line] or lines or ["no message"]
        raise RuntimeError(f"{' '.join(command[1:])[:120]}: {errors[-1].strip()[:200]}")


def make_tokens(root: Path, corpus: str, blocks: int) -> None:
    """Text, the prepared tokens of it, and `blocks` of these in a flat file; what is there already stays."""
    flat = root / "blocks.bin"
    if not flat.exists():
        _write_corpus(root, corpus, int(1.08 * blocks * SEQUENCE_TOKENS))
    if not (root / "lockstep-tokens" / "manifest.json").exists():
        prepare_corpus(root, "tokens")
    if not flat.exists():
        write_blocks(root, blocks)


def _write_corpus(root: Path, corpus: str, wanted: int) -> None:
    root.mkdir(parents=True, exist_ok=True)
    size = 0
    with (root / "corpus.jsonl").open("w") as lines:
        for text in _linux_texts(root) if corpus == "linux" else _stdlib_texts():
            lines.write(json.dumps({"text": text}) + "\n")
            size += len(text.encode())
            if size >= wanted:
                break
        else:
            raise RuntimeError(f"corpus {corpus} has only {size} bytes of text, and {wanted} are needed")


def _linux_texts(root: Path) -> Iterator[str]:
    """C files of Debian's kernel source, read out of the package without unpacking it."""
    packages = list(root.glob(f"{DEBIAN_SOURCE}*.deb"))
    if not packages:
        _run(["env", "-C", str(root), "apt-get", "download", DEBIAN_SOURCE])
        packages = list(root.glob(f"{DEBIAN_SOURCE}*.deb"))
    with subprocess.Popen(
        ["dpkg-deb", "--fsys-tarfile", packages[0]], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as unpacker:
        with tarfile.open(fileobj=unpacker.stdout, mode="r|") as package:
            for entry in package:
                if entry.name.endswith(".tar.xz"):
                    with tarfile.open(fileobj=package.extractfile(entry), mode="r|xz") as source:
                        for file in source:
                            content = source.extractfile(file) if file.name.endswith((".c", ".h")) else None
                            if content is not None:
                                yield content.read().decode(errors="replace")
        unpacker.kill()


def _stdlib_texts() -> Iterator[str]:
    for file in sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py")):
        yield file.read_bytes().decode(errors="replace")


def make_images(root: Path, count: int) -> None:
    """`count` JPEGs of 256 x 256 in ten classes, from a fixed seed: coloured clouds that compress as photographs do."""
    if (root / "lockstep-images" / "manifest.json").exists():
        return
    generator = np.random.RandomState(0)
    for number in range(count):
        folder = root / "jpegs" / f"class-{number % 10}"
        folder.mkdir(parents=True, exist_ok=True)
        coarse, fine = (generator.randint(0, 256, (side, side, 3), dtype=np.uint8) for side in (8, 64))
        clouds = Image.fromarray(coarse).resize((256, 256), Image.Resampling.BICUBIC)
        detail = Image.fromarray(fine).resize((256, 256), Image.Resampling.BICUBIC)
        Image.blend(clouds, detail, 0.2).save(folder / f"{number:05d}.jpg", quality=90)
    prepare_corpus(root, "images")


def make_format(name: str, kind: str, root: Path, python: Path) -> None:
    """A corpus in a peer's own format, written in its environment; RuntimeError of one line if that fails."""
    ready, target = root / f".{name}-{kind}.ready", root / f"{name}-{kind}"
    if ready.exists() and target.exists():
        return
    if target.exists():
        _run(["rm", "-r", str(target)])
    _run([str(python), str(FORMATS), name, kind, str(root)])
    ready.touch()


def batches_of(kind: str, blocks: int, images: int) -> int:
    """Batches of an epoch."""
    return (blocks if kind == "tokens" else images) // BATCH_SAMPLES
