"""The contenders of `loaders.py`: each reads one corpus as its own documentation says, in a process of its own.

Runs in the environment of the library that it tries, so it imports nothing of this project but for this project's own
contender. It answers one JSON line for each that it is sent; the first tells of the first batch.
"""

from __future__ import annotations

import copy
import functools
import gc
import io
import itertools
import json
import math
import os
import random
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

STARTED = time.perf_counter()

import numpy as np  # noqa: E402
import torch  # noqa: E402

BATCH_SAMPLES = 32
BLOCK_TOKENS = 1025
IMAGE_SIZE_PIXELS = 64
SEED = 1
# More than any contender makes ahead while others run: three chunks of ten batches of images here, 500 samples in grain.
MADE_AHEAD_BATCHES = 32


class Job(NamedTuple):
    """What a contender is told: `directory` holds the corpus in every format."""

    name: str
    kind: str
    workers: int
    directory: str

    @property
    def path(self) -> Path:
        return Path(self.directory)


class Opened(NamedTuple):
    """A loader: `iter` begins an epoch, or the rest of the one that a state was given of."""

    loader: Iterable[Any]
    state: Callable[[], Any] | None = None
    load_state: Callable[[Any], None] | None = None


def picture(encoded: bytes | Any, generator: Any = random) -> np.ndarray[Any, Any]:
    """(3, H, W) uint8 of a JPEG's bytes, or of what a library has opened already: a random part of 8 to 100 % of the area,
    as torchvision's RandomResizedCrop chooses it, resized with Pillow and flipped every other time."""
    from PIL import Image

    image = (encoded if isinstance(encoded, Image.Image) else Image.open(io.BytesIO(encoded))).convert("RGB")
    box = _random_part(*image.size, generator)
    part = image.resize((IMAGE_SIZE_PIXELS, IMAGE_SIZE_PIXELS), Image.Resampling.BILINEAR, box)
    if generator.random() < 0.5:
        part = part.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.ascontiguousarray(np.asarray(part).transpose(2, 0, 1))


def _random_part(width: int, height: int, generator: Any) -> tuple[int, int, int, int]:
    for _ in range(10):
        area = width * height * generator.uniform(0.08, 1.0)
        ratio = math.exp(generator.uniform(math.log(3 / 4), math.log(4 / 3)))
        wide, high = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < wide <= width and 0 < high <= height:
            left, top = int(generator.random() * (width - wide + 1)), int(generator.random() * (height - high + 1))
            return left, top, left + wide, top + high
    return 0, 0, width, height


class Blocks(torch.utils.data.Dataset[Any]):
    """Map-style: rows of a flat file, by number or by a list of numbers."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._rows: np.ndarray[Any, Any] | None = None

    @property
    def rows(self) -> np.ndarray[Any, Any]:
        if self._rows is None:  # each worker maps the file itself
            self._rows = np.asarray(np.memmap(self.path, dtype=np.uint16, mode="r")).reshape(-1, BLOCK_TOKENS)
        return self._rows

    def __len__(self) -> int:
        return self.path.stat().st_size // (2 * BLOCK_TOKENS)

    def __getitem__(self, index: int | list[int]) -> Any:
        return torch.from_numpy(self.rows[index].copy() if isinstance(index, int) else self.rows[index])

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "_rows": None}


class JpegFiles(torch.utils.data.Dataset[Any]):
    """Map-style: files of a folder per class."""

    def __init__(self, folder: Path) -> None:
        self.files = sorted(folder.glob("*/*.jpg"))
        self.classes = sorted({file.parent.name for file in self.files})

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Any:
        file = self.files[index]
        return torch.from_numpy(picture(file.read_bytes())), self.classes.index(file.parent.name)


def map_style(job: Job) -> torch.utils.data.Dataset[Any]:
    return Blocks(job.path / "blocks.bin") if job.kind == "tokens" else JpegFiles(job.path / "jpegs")


def worker_options(job: Job) -> dict[str, Any]:
    """As torch's own documentation advises: workers that stay. https://docs.pytorch.org/docs/stable/data.html"""
    return {"num_workers": job.workers} | ({"persistent_workers": True} if job.workers else {})


class BareGather:
    """The limit: rows of a memory map, copied by their numbers."""

    def __init__(self, job: Job) -> None:
        self.rows, self.position = Blocks(job.path / "blocks.bin").rows, 0

    def __iter__(self) -> Iterator[torch.Tensor]:
        order = np.random.RandomState(SEED).permutation(len(self.rows))
        while self.position < len(order):
            start, self.position = self.position, self.position + BATCH_SAMPLES
            yield torch.from_numpy(self.rows[order[start : self.position]])
        self.position = 0


def open_bare(job: Job) -> Opened:
    bare = BareGather(job)
    return Opened(bare, lambda: bare.position, lambda state: setattr(bare, "position", state))


def open_lockstep(job: Job) -> Opened:
    from benchmarks.loader_lockstep import LockstepBatches

    batches = LockstepBatches(job.path, job.kind, job.workers)
    return Opened(batches, lambda: batches.position, lambda state: setattr(batches, "position", state))


def open_torch(job: Job) -> Opened:
    """Per sample: https://docs.pytorch.org/docs/stable/data.html (map-style, automatic batching)."""
    return Opened(torch.utils.data.DataLoader(map_style(job), BATCH_SAMPLES, shuffle=True, **worker_options(job)))


def open_torch_batched(job: Job) -> Opened:
    """https://docs.pytorch.org/docs/stable/data.html#disable-automatic-batching: the sampler gives whole batches."""
    dataset = map_style(job)
    sampler = torch.utils.data.BatchSampler(torch.utils.data.RandomSampler(dataset), BATCH_SAMPLES, drop_last=False)  # type: ignore[arg-type]
    return Opened(torch.utils.data.DataLoader(dataset, sampler=sampler, batch_size=None, **worker_options(job)))


def stateful(job: Job, dataset: Any, **options: Any) -> Opened:
    """https://docs.pytorch.org/data/0.11/stateful_dataloader_tutorial.html"""
    from torchdata.stateful_dataloader import StatefulDataLoader

    loader = StatefulDataLoader(dataset, batch_size=BATCH_SAMPLES, **worker_options(job), **options)
    return Opened(loader, loader.state_dict, loader.load_state_dict)


def open_torchdata(job: Job) -> Opened:
    torch.manual_seed(SEED)  # a fresh process that resumes seeds as the one before it
    return stateful(job, map_style(job), shuffle=True)


def open_mds(job: Job) -> Opened:
    """https://docs.mosaicml.com/projects/streaming/en/latest/ (getting started; "batch_size" must be told; resumption)."""
    from streaming import StreamingDataLoader, StreamingDataset
    from streaming.base.util import clean_stale_shared_memory

    class Pictures(StreamingDataset):
        def __getitem__(self, at: Any) -> Any:
            sample = super().__getitem__(at)
            return torch.from_numpy(picture(sample["image"])), sample["label"]

    clean_stale_shared_memory()
    cls = StreamingDataset if job.kind == "tokens" else Pictures
    dataset = cls(local=str(job.path / f"mds-{job.kind}"), shuffle=True, batch_size=BATCH_SAMPLES)
    loader = StreamingDataLoader(dataset, batch_size=BATCH_SAMPLES, **worker_options(job))
    return Opened(loader, loader.state_dict, loader.load_state_dict)


def open_litdata(job: Job) -> Opened:
    """https://lightning.ai/docs/litdata/features/llm-pre-training (TokensLoader) and the README (transform in a subclass)."""
    from litdata import StreamingDataLoader, StreamingDataset, TokensLoader

    class Pictures(StreamingDataset):
        def __getitem__(self, index: Any) -> Any:
            encoded, label = super().__getitem__(index)
            return torch.from_numpy(picture(encoded)), label

    folder = str(job.path / f"litdata-{job.kind}")
    if job.kind == "tokens":
        dataset = StreamingDataset(folder, item_loader=TokensLoader(block_size=BLOCK_TOKENS), shuffle=True)
    else:
        dataset = Pictures(folder, shuffle=True)
    loader = StreamingDataLoader(dataset, batch_size=BATCH_SAMPLES, **worker_options(job))
    return Opened(loader, loader.state_dict, loader.load_state_dict)


def open_webdataset(job: Job) -> Opened:
    """https://webdataset.github.io/webdataset/sharding/ and the README: batches made in the workers, WebLoader without."""
    import webdataset as wds

    urls = [str(path) for path in sorted(job.path.glob(f"webdataset-{job.kind}/*.tar"))]
    shuffled = wds.WebDataset(urls, shardshuffle=len(urls), empty_check=False).shuffle(1000)
    if job.kind == "tokens":
        samples = shuffled.to_tuple("bin").map(lambda sample: (np.frombuffer(sample[0], np.uint16),))
    else:
        samples = shuffled.decode("pil").to_tuple("jpg", "cls").map_tuple(picture, int)
    return Opened(wds.WebLoader(samples.batched(BATCH_SAMPLES), batch_size=None, **worker_options(job)))


def _hf_pictures(rows: dict[str, Any]) -> dict[str, Any]:
    return {"image": [torch.from_numpy(picture(image)) for image in rows["image"]], "label": rows["label"]}


def open_hf_map(job: Job) -> Opened:
    """https://huggingface.co/docs/datasets/use_with_pytorch: with_format, or a transform of whole batches."""
    import datasets

    dataset = datasets.load_from_disk(str(job.path / f"hf-{job.kind}"))
    ready = dataset.with_format("torch") if job.kind == "tokens" else dataset.with_transform(_hf_pictures)
    torch.manual_seed(SEED)
    return stateful(job, ready, shuffle=True)


def open_hf_stream(job: Job) -> Opened:
    """https://huggingface.co/docs/datasets/stream: shuffle with a buffer, several shards, StatefulDataLoader to resume."""
    import datasets

    files = [str(path) for path in sorted(job.path.glob(f"parquet-{job.kind}/*.parquet"))]
    stream = datasets.load_dataset("parquet", data_files=files, split="train", streaming=True)
    shuffled = stream.shuffle(seed=SEED, buffer_size=1000)
    if job.kind == "tokens":
        return stateful(job, shuffled.with_format("torch"))
    return stateful(job, shuffled.map(_hf_pictures, batched=True, batch_size=BATCH_SAMPLES))


class GrainBlocks:
    """A random-access source over the flat file, as grain's documentation makes them."""

    def __init__(self, path: Path) -> None:
        self.blocks = Blocks(path)

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: Any) -> Any:
        return self.blocks.rows[index].copy()


def _grain_picture(record: bytes, generator: np.random.Generator) -> tuple[Any, int]:
    return picture(record[8:], generator), int.from_bytes(record[:8], "little")


def open_grain(job: Job, *, array_record: bool = False) -> Opened:
    """https://google-grain.readthedocs.io/en/latest/tutorials/dataset_basic_tutorial.html (shuffle, batch, to_iter_dataset)
    and data_sources (ArrayRecord for random access); a memory map needs no read threads."""
    import grain

    if array_record or job.kind == "images":
        files = [str(path) for path in sorted(job.path.glob(f"arrayrecord-{job.kind}/*.arecord"))]
        source = grain.MapDataset.source(grain.sources.ArrayRecordDataSource(files)).shuffle(seed=SEED)
        if job.kind == "images":
            dataset = source.random_map(_grain_picture, seed=SEED)
        else:
            dataset = source.map(functools.partial(np.frombuffer, dtype=np.uint16))
        # The default of 500 elements made ahead is for samples: these are batches, and 16,000 samples could be read that were
        # made while others ran.
        options = grain.ReadOptions(num_threads=16, prefetch_buffer_size=16)
    else:
        dataset = grain.MapDataset.source(GrainBlocks(job.path / "blocks.bin")).shuffle(seed=SEED)
        options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    ready = dataset.batch(BATCH_SAMPLES).to_iter_dataset(options)
    if job.workers:
        ready = ready.mp_prefetch(grain.MultiprocessingOptions(num_workers=job.workers))
    return _grain_opened(ready)


def _grain_opened(dataset: Any) -> Opened:
    """grain keeps its state in the iterator: each `iter` of this one is the same until it ends."""
    current: list[Any] = []

    class Loader:
        def __iter__(self) -> Iterator[Any]:
            if not current:
                current.append(iter(dataset))
            for batch in current[0]:
                yield torch.from_numpy(batch) if isinstance(batch, np.ndarray) else tuple(map(torch.as_tensor, batch))
            current.clear()

    def load(state: Any) -> None:
        current[:] = [iter(dataset)]
        current[0].set_state(state)

    return Opened(Loader(), lambda: current[0].get_state(), load)


CONTENDERS: dict[str, Callable[[Job], Opened]] = {
    "bare": open_bare,
    "lockstep": open_lockstep,
    "torch": open_torch,
    "torch_batched": open_torch_batched,
    "torchdata": open_torchdata,
    "mds": open_mds,
    "litdata": open_litdata,
    "webdataset": open_webdataset,
    "hf_map": open_hf_map,
    "hf_stream": open_hf_stream,
    "grain": open_grain,
    "grain_arrayrecord": functools.partial(open_grain, array_record=True),
}


def tensor_of(batch: Any) -> torch.Tensor:
    """The samples of a batch, whatever the loader wraps them in."""
    if isinstance(batch, dict):
        batch = batch.get("tokens", batch.get("image"))
    while isinstance(batch, (tuple, list)):
        batch = batch[0]
    return torch.as_tensor(batch)


class Contender:
    """A loader that is read epoch after epoch."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._opened = CONTENDERS[job.name](job)
        self._batches = iter(self._opened.loader)

    def first(self) -> dict[str, Any]:
        """What the first batch is, and when it came after this process began to import."""
        batch = tensor_of(next(self._batches))
        milliseconds = (time.perf_counter() - STARTED) * 1e3
        return {"first_batch_ms": milliseconds, "shape": list(batch.shape), "dtype": str(batch.dtype)}

    def run(self, seconds: float) -> dict[str, Any]:
        """Samples a second over so many seconds; what was made ahead while others ran, and ends of epochs, do not count."""
        for _ in range(MADE_AHEAD_BATCHES):
            self._next()
        samples, spent = 0, 0.0
        while spent < seconds:
            start = time.perf_counter()
            for batch in self._batches:
                samples += len(tensor_of(batch))
                if time.perf_counter() - start > seconds - spent:
                    break
            else:
                spent += time.perf_counter() - start
                self._begin_epoch()
                continue
            spent += time.perf_counter() - start
        return {"samples_per_second": samples / spent}

    def _next(self) -> Any:
        for batch in self._batches:
            return batch
        return self._begin_epoch()

    def _begin_epoch(self) -> Any:
        self._batches = iter(self._opened.loader)
        return next(self._batches)

    def resume(self, batches: int) -> dict[str, Any]:
        """Time to the next batch after `batches` batches, in fresh objects, and whether it is the one that came next.

        A loader that keeps no state can only be read again up to there, which is what it is charged for."""
        self._close()
        begun = time.perf_counter()
        opened = CONTENDERS[self._job.name](self._job)
        iterator = iter(opened.loader)
        next(iterator)
        fresh = time.perf_counter() - begun
        for _ in itertools.islice(iterator, batches - 1):
            pass
        result: dict[str, Any] = {"fresh_ms": fresh * 1e3}
        if opened.state is None:
            return result | {"reread_ms": (time.perf_counter() - begun) * 1e3}
        state = copy.deepcopy(opened.state())
        expected = tensor_of(next(iterator)).clone()
        del opened, iterator
        gc.collect()
        begun = time.perf_counter()
        opened = CONTENDERS[self._job.name](self._job)
        assert opened.load_state is not None
        opened.load_state(state)
        found = tensor_of(next(iter(opened.loader)))
        seconds = time.perf_counter() - begun
        same = found.shape == expected.shape and bool((found.long() == expected.long()).all())
        return result | {"resume_ms": seconds * 1e3, "identical": same}

    def _close(self) -> None:
        self._batches, self._opened = iter(()), Opened(())
        gc.collect()

    def end(self) -> None:
        """What a library leaves on the machine is taken away."""
        self._close()
        if self._job.name == "mds":
            from streaming.base.util import clean_stale_shared_memory

            clean_stale_shared_memory()


def main() -> None:
    """Answer the gate. What libraries print goes to the error stream, which the gate keeps in a file."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    torch.set_num_threads(1)
    random.seed(SEED)
    contender: Contender | None = None

    def answer(work: Callable[[], dict[str, Any]]) -> None:
        try:
            found = work()
        except Exception as error:  # a peer's failure is a row of the table; its traceback is kept
            sys.excepthook(*sys.exc_info())
            text = str(error).strip().rpartition("\n")[2]  # a worker's error ends with what it was
            text = " ".join(text.split())
            found = {"error": f"{type(error).__name__}: {text[:200]}"}
        answers.write(json.dumps(found) + "\n")

    def begin() -> dict[str, Any]:
        nonlocal contender
        contender = Contender(Job(**json.loads(sys.argv[1])))
        return contender.first()

    answer(begin)
    for line in sys.stdin:
        request = json.loads(line)
        assert contender is not None, "the gate asks nothing of one that could not begin"
        answer(functools.partial({"run": contender.run, "resume": contender.resume}[request["do"]], request["amount"]))
    if contender is not None:
        contender.end()
    sys.stderr.flush()
    os._exit(0)  # workers and threads of the libraries end with their parent


if __name__ == "__main__":
    main()
