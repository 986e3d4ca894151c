"""Datasets at addresses: the same samples as from the directory, whatever servers and networks do."""

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from io import FileIO
from pathlib import Path

import fsspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.addresses import is_remote, parse_address
from data.config import DataConfig
from data.dataset import open_dataset
from data.download import Patience, download
from data.errors import CorruptData, Unavailable
from data.manifest import BLOCK_BYTES, FileEntry, fingerprint_of
from data.needs import SAME_USE_LOOKS, Needs
from data.open_shards import MOST_UNEXPECTED
from data.packing import ensure_packing
from data.prepare import prepare
from data.remote import RemoteStore
from data.samples import Dataset
from data.store import LocalStore, open_store, read_manifest
from data.tokenizers import load_tokenizer
from tests.data.data_helpers import lorem, token_config, write_images, write_jsonl
from tests.data.faulty_server import Fault, FaultyHandler, FaultyServer, answering, serving


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokens in many small shards, with a tokenizer in a file."""
    root = tmp_path_factory.mktemp("prepared")
    return prepare(token_config(root, documents=700, shard_bytes=3000, tokenizer="bpe:300"))


@pytest.fixture
def server(prepared: Path) -> Iterator[FaultyServer]:
    with serving(prepared) as server:
        yield server


def remote_config(address: str, cache: Path, **changes: object) -> DataConfig:
    values = {
        "directory": address,
        "cache_directory": cache,
        "download_pause_seconds": 0.001,
        "download_retries": 3,
        "sequence_tokens": 16,
    }
    return DataConfig.model_validate(values | changes)


def remote_store(address: str, cache: Path, **changes: object) -> RemoteStore:
    store = open_store(address, remote_config(address, cache, **changes))
    assert isinstance(store, RemoteStore)
    return store


def opened(store: object, **changes: object) -> Dataset:
    config = DataConfig.model_validate({"sequence_tokens": 16} | changes)
    return open_dataset(store, config, "train")  # type: ignore[arg-type]


def shard_files(directory: Path) -> list[FileEntry]:
    return [file for shard in read_manifest(LocalStore(directory)).splits["train"].shards for file in shard.files()]


def assert_same_samples(remote: Dataset, directory: Path, **changes: object) -> None:
    local = opened(LocalStore(directory), **changes)
    assert remote.fingerprint == local.fingerprint
    ids = np.arange(local.samples)
    for found, expected in zip(remote.gather(ids), local.gather(ids), strict=True):
        np.testing.assert_equal(found, expected)


FAULTS = [
    [Fault("status", status=500), Fault("status", status=503), Fault("status", status=429)],
    [Fault("status", status=404), Fault("status", status=404)],  # it appears late
    [Fault("reset", 0), Fault("reset", 1), Fault("reset", 1500)],
    [Fault("truncate", 0), Fault("truncate", 100), Fault("truncate", 2000)],
    [Fault("flip", 10), Fault("flip", 2500)],
    [Fault("longer"), Fault("longer")],
    [Fault("stall", 0), Fault("stall", 2000)],
    [Fault("slow")],
]


@pytest.mark.parametrize("ranges", [True, False], ids=["ranges", "no ranges"])
def test_servers_that_fail_and_recover_give_the_same_samples(prepared: Path, tmp_path: Path, ranges: bool) -> None:
    with serving(prepared, ranges=ranges) as server:
        names = [entry.name for entry in shard_files(prepared) if entry.name.endswith(".bin")]
        for name, faults in zip(names, FAULTS, strict=False):
            server.faults[name] = list(faults)
        # Of a busy machine an answer may come after the timeout too: more tries than there are faults.
        options = {"download_timeout_seconds": 0.5, "download_retries": 12}
        store = remote_store(server.address, tmp_path / "cache", **options)
        assert_same_samples(opened(store), prepared)
        assert all(not server.faults[name] for name in names)
        again = remote_store(server.address, tmp_path / "cache")
        server.requests.clear()
        assert_same_samples(opened(again), prepared)
        assert list(server.requests) == ["manifest.json"]


def test_what_stays_wrong_is_told(server: FaultyServer, prepared: Path, tmp_path: Path) -> None:
    entries = [entry for entry in shard_files(prepared) if entry.name.endswith(".bin")]
    store = remote_store(server.address, tmp_path / "cache")
    hasty = remote_store(server.address, tmp_path / "cache", download_timeout_seconds=0.2)  # an answer may take longer
    cases = {
        Fault("status", status=404): (CorruptData, "listed in the manifest but missing"),
        Fault("status", status=500): (Unavailable, "cannot be read (ClientResponseError: 500"),
        Fault("reset", 10): (Unavailable, "cannot be read (Client"),
        Fault("stall", 10): (
            Unavailable,
            "cannot be read (nothing, or too little, within data.download_timeout_seconds)",
        ),
        Fault("truncate", 10): (CorruptData, f"{entries[4].bytes - 10} bytes short of the manifest's"),
        Fault("flip", 10): (CorruptData, "fetched 3 times, and never what the manifest lists"),
        Fault("longer"): (CorruptData, "fetched 3 times, and never what the manifest lists"),
    }
    for entry, (fault, (kind, part)) in zip(entries, cases.items(), strict=False):
        server.always[entry.name] = fault
        with pytest.raises(kind) as raised:
            (hasty if fault.kind == "stall" else store).open(entry)
        assert str(raised.value).startswith(f"{server.address}/{entry.name}: ")
        assert part in str(raised.value)
        assert "\n" not in str(raised.value)
        del server.always[entry.name]
        with store.open(entry) as file:
            assert file.read() == (prepared / entry.name).read_bytes()


@pytest.mark.parametrize("status", [401, 403])
def test_denied_access_is_told_at_once(
    server: FaultyServer, prepared: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, status: int
) -> None:
    store = remote_store(server.address, tmp_path / "cache", download_pause_seconds=60)
    entry = shard_files(prepared)[0]
    why = rf"access is denied \(ClientResponseError: {status}.*\); give credentials in the environment .*netrc"
    for name in ("manifest.json", entry.name):
        server.always[name] = Fault("status", status=status)
    with pytest.raises(Unavailable, match=f"{server.address}/manifest.json: {why}"):
        read_manifest(store)
    with pytest.raises(Unavailable, match=f"{server.address}/{entry.name}: {why}"):
        store.open(entry)
    assert server.requests == {"manifest.json": 1, entry.name: 1}
    assert caplog.text == ""


class GuardedHandler(FaultyHandler):
    """Asks for a name and a password."""

    def do_GET(self) -> None:
        if self.headers.get("Authorization"):
            super().do_GET()
        else:
            self.refuse(401)


def test_credentials_for_http_come_from_netrc(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with answering(FaultyServer(prepared), GuardedHandler) as server:
        monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
        with pytest.raises(Unavailable, match="access is denied"):
            read_manifest(remote_store(server.address, tmp_path / "cache"))
        (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password hunter2\n")
        assert_same_samples(opened(remote_store(server.address, tmp_path / "cache")), prepared)


def test_that_it_is_tried_again_is_told_once(
    server: FaultyServer, prepared: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    entry = shard_files(prepared)[0]
    for name in ("manifest.json", entry.name):
        server.faults[name] = [Fault("status", status=503), Fault("truncate", 1000), Fault("reset", 1500)]
    server.faults["manifest.json"].pop(1)  # how long that is nobody says beforehand
    store = remote_store(server.address, tmp_path / "cache", download_pause_seconds=0.2)
    read_manifest(store)
    store.open(entry).close()
    told = [record.getMessage() for record in caplog.records]
    assert [line.split(" (")[0] for line in told] == [
        f"{server.address}/{name}: cannot be read now" for name in ("manifest.json", entry.name)
    ]
    for line in told:
        assert re.search(r"\(ClientResponseError: 503.*\); trying again for up to 2 s$", line)


@pytest.mark.parametrize(
    ("address", "why"),
    [
        ("github://a/b", "cannot be used as an address"),
        ("reference://x", "cannot be used as an address"),
        ("dir://x", "cannot be used as an address"),
        ("generic://x", "cannot be used as an address"),
        ("tar:///nowhere/x", "cannot be used as an address"),
        ("zip:///tmp", "cannot be used as an address"),
        ("cached://x", "Please provide"),
        ("ftp://127.0.0.1:9/x", "cannot be read .*ConnectionRefusedError.* is the server there?"),
    ],
)
def test_addresses_that_cannot_be_opened_are_told_in_a_line(tmp_path: Path, address: str, why: str) -> None:
    with pytest.raises(ValueError, match=f"^{address}: {why}") as raised:
        remote_store(address, tmp_path / "cache")
    assert "\n" not in str(raised.value)


class StumblingSource:
    """A file that is sent in pieces of 100 bytes, with a broken connection after each."""

    address = "stumbling://file"

    def __init__(self, content: bytes) -> None:
        self.content = content

    def read_from(self, start: int) -> tuple[int, Iterator[bytes]]:
        def pieces() -> Iterator[bytes]:
            yield self.content[start : start + 100]
            raise ConnectionResetError

        return start, pieces()


def test_a_download_that_goes_on_is_not_given_up(prepared: Path, tmp_path: Path) -> None:
    entry = shard_files(prepared)[0]
    source = StumblingSource((prepared / entry.name).read_bytes())
    with FileIO(tmp_path / "file", "a+") as file:
        download(source, entry, file, Patience(retries=1, first_pause_seconds=0), lambda missing: False)
        file.seek(0)
        assert file.read() == source.content
    assert entry.bytes > 1000


def test_pauses_grow_and_are_the_same_every_time() -> None:
    patience = Patience(first_pause_seconds=0.5, longest_pause_seconds=30)
    assert [patience.pause(failures) for failures in (1, 2, 3, 6, 7, 8, 5000)] == [0.5, 1, 2, 16, 30, 30, 30]


@pytest.mark.parametrize("scheme", ["memory", "file"])
def test_other_addresses(scheme: str, prepared: Path, tmp_path: Path) -> None:
    address = f"file://{prepared}" if scheme == "file" else "memory://bucket/dataset"
    if scheme == "memory":
        fsspec.filesystem("memory").put(str(prepared), "/bucket/dataset", recursive=True)
    store = remote_store(f"{address}/", tmp_path / "cache")
    assert store.address == address
    assert_same_samples(opened(store), prepared)
    assert load_tokenizer(store).vocabulary_size == 300
    with pytest.raises(ValueError, match="not a prepared dataset"):
        read_manifest(remote_store(f"{address}/nowhere", tmp_path / "cache"))


def test_images_at_an_address(tmp_path: Path) -> None:
    source = f"images:{write_images(tmp_path / 'pictures', count=60)}"
    config = DataConfig(source=source, directory=tmp_path / "made", validation_fraction=0.2, shard_bytes=4000)
    directory = prepare(config)
    with serving(directory) as server:
        store = remote_store(server.address, tmp_path / "cache")
        assert_same_samples(opened(store, sequence_tokens=256), directory, sequence_tokens=256)
    assert len(os.listdir(tmp_path / "cache" / "files")) > 3


def test_a_missing_package_is_one_line_with_the_command(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules.update(s3fs=None, gcsfs=None, aiohttp=None)\n"
        "from data.config import DataConfig; from data.store import open_store\n"
        "for address in ('s3://bucket/x', 'gs://bucket/x', 'https://host/x'):\n"
        "    try: open_store(address, DataConfig())\n"
        "    except ValueError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert [line.split(": ")[0] for line in lines] == ["s3://bucket/x", "gs://bucket/x", "https://host/x"]
    assert lines[0].endswith("pip install 'lockstep[s3]'")
    assert lines[1].endswith("pip install 'lockstep[gcs]'")
    assert "aiohttp" in lines[2]


def test_addresses() -> None:
    assert parse_address("a/b") == Path("a/b")
    assert parse_address("s3://bucket/a/") == "s3://bucket/a"
    assert parse_address("sftp://me@host/a") == "sftp://me@host/a"
    assert parse_address("hf://datasets/me/it@main") == "hf://datasets/me/it@main"
    assert not is_remote(Path("s3://x"))
    for address in ("https://me:pw@host/a", "https://token@host/a", "s3://key:pw@bucket/a", "https://h/a?sig=pw"):
        with pytest.raises(ValueError, match="credentials come from the environment") as raised:
            parse_address(address)
        assert "pw" not in str(raised.value).replace("password", "")
        assert "token" not in str(raised.value)
    for address in ("://x", "s3://", "http:///x", "s3:///bucket"):
        with pytest.raises(ValueError, match="not an address; it has the form"):
            parse_address(address)
    for address in ("simplecache::s3://bucket/x", "zip://a::s3://bucket/x"):
        with pytest.raises(ValueError, match="chained addresses are not read"):
            parse_address(address)
    for address in ("http://[::1/x", "http://[::1]/x", "http://[1/x", "http://host:port/x"):
        with pytest.raises(ValueError, match="not a valid address"):
            parse_address(address)


def test_keys_without_effect_are_refused() -> None:
    with pytest.raises(ValueError, match=r"cache_bytes, download_threads means nothing to data\.directory=here"):
        DataConfig(directory="here", cache_bytes=5, download_threads=2)
    with pytest.raises(ValueError, match=r"download_timeout_seconds means nothing to data\.directory=memory://x"):
        DataConfig(directory="memory://x", download_timeout_seconds=5)
    with pytest.raises(ValueError, match="is neither a path nor an address"):
        DataConfig(directory=3)
    config = DataConfig(directory="https://host/a", download_timeout_seconds=5)
    assert DataConfig.model_validate(config.model_dump(mode="json")) == config
    with pytest.raises(ValueError, match="prepared on a local disk"):
        prepare(config)


def test_remote_data_is_read_in_windows_unless_told_otherwise() -> None:
    assert DataConfig(directory="here").order == "global"
    assert DataConfig(directory="s3://bucket/a", lanes=3).order == "windowed"
    assert DataConfig(directory="s3://bucket/a", order="global").order == "global"
    streams = {
        "near": {"source": "text:a", "directory": "here", "weight": 1},
        "far": {"source": "text:b", "directory": "s3://bucket/b", "weight": 1},
    }
    mixed = DataConfig.model_validate({"streams": streams, "cache_bytes": 5, "download_timeout_seconds": 3})
    assert mixed.order == "windowed"
    near, far = mixed.by_stream().values()
    assert (near.directory, near.order, near.cache_bytes) == (Path("here"), "windowed", DataConfig().cache_bytes)
    assert (far.directory, far.order, far.cache_bytes) == ("s3://bucket/b", "windowed", 5)
    del streams["far"]
    with pytest.raises(ValueError, match="cache_bytes means nothing to"):
        DataConfig.model_validate({"streams": streams, "cache_bytes": 5})


def wait_for_threads(store: RemoteStore) -> None:
    """Until no thread fetches ahead any more."""
    import threading

    for thread in threading.enumerate():
        if thread.name == "lockstep-download":
            thread.join(60)
    assert store._threads == 0


def test_what_is_expected_is_here_before_it_is_asked_for(server: FaultyServer, prepared: Path, tmp_path: Path) -> None:
    store = remote_store(server.address, tmp_path / "cache")
    dataset = opened(store)
    assert dataset.looks_ahead_samples == dataset.samples
    server.faults["train-00000.bin"] = [Fault("reset", 1000)]
    dataset.expect(0, dataset.samples, np.arange(dataset.samples))
    wait_for_threads(store)
    assert all(store.cache.holds(entry) for entry in shard_files(prepared))
    server.requests.clear()
    assert_same_samples(dataset, prepared)
    assert not server.requests


def test_no_more_is_fetched_ahead_than_there_is_room_for(server: FaultyServer, prepared: Path, tmp_path: Path) -> None:
    entries = shard_files(prepared)
    limit = sum(entry.bytes for entry in entries[:8])
    store = remote_store(server.address, tmp_path / "cache", cache_bytes=limit)
    dataset = opened(store)
    assert 0 < dataset.looks_ahead_samples < dataset.samples
    ends = np.cumsum(dataset.shard_samples)
    starts = ends - dataset.shard_samples
    shards = len(ends)
    # So far apart that each shard has one use of its own.
    for start, stop in zip(starts.tolist(), ends.tolist(), strict=True):
        dataset.expect(start, stop, np.arange(start, stop))
        wait_for_threads(store)
        store._looked_at = -1.0e9
    held = [store.cache.holds(entry) for entry in entries]
    assert held == [True] * 8 + [False] * (len(entries) - 8)
    for number in range(shards):
        dataset.reached(int(starts[number]))
        wait_for_threads(store)
        store._looked_at = -1.0e9
        server.requests.clear()
        dataset.gather(np.arange(starts[number], ends[number]))
        assert not server.requests, number
        assert store.cache.used_bytes() <= limit


def test_maps_of_what_is_past_are_dropped(server: FaultyServer, prepared: Path, tmp_path: Path) -> None:
    dataset = opened(remote_store(server.address, tmp_path / "cache"))
    shards = dataset._shards  # type: ignore[attr-defined]
    ends = np.cumsum(dataset.shard_samples)
    assert len(ends) > MOST_UNEXPECTED + 5
    local, most = opened(LocalStore(prepared)), 0
    for last in [*(ends - 1).tolist(), *(ends - 2).tolist()]:
        ids = np.array([last, 0, last - 1])
        np.testing.assert_equal(dataset.gather(ids), local.gather(ids))
        most = max(most, len(shards))
    assert most == MOST_UNEXPECTED + 1
    assert_same_samples(dataset, prepared)  # what is read together is open together
    dataset.expect(0, dataset.samples, np.arange(dataset.samples))
    dataset.gather(np.arange(dataset.samples))
    assert len(shards) == len(ends)  # all of them are needed still
    files = Path("/proc/self/maps").read_text()
    assert files.count(str(tmp_path / "cache")) >= len(ends)
    local.gather(np.arange(local.samples))
    assert len(local._shards) == len(ends)  # type: ignore[attr-defined]


def test_the_cache_may_go_between_any_two_reads(server: FaultyServer, prepared: Path, tmp_path: Path) -> None:
    dataset, local = opened(remote_store(server.address, tmp_path / "cache")), opened(LocalStore(prepared))
    for ids in np.array_split(np.arange(local.samples), 25):
        np.testing.assert_equal(dataset.gather(ids)[1], local.gather(ids)[1])
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)  # a thread may be writing into it
        dataset.expect(int(ids[0]), int(ids[-1]) + 1, ids)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokens in two shards of several blocks each: what is read later is hashed later."""
    root = tmp_path_factory.mktemp("large")
    source = write_jsonl(root / "corpus.jsonl", [lorem(number) * 50 for number in range(300)])
    config = DataConfig(source=f"jsonl:{source}#text", directory=root / "made", shard_bytes=5 << 20, packing="best_fit")
    directory = prepare(config)
    ensure_packing(LocalStore(directory), config)
    return directory


def alter_in_place(cache: Path) -> list[str]:
    """Another value in every byte but the first block's of every large file, which stays the same file: whose those are."""
    altered = []
    for path in (cache / "files").iterdir():
        if path.stat().st_size > BLOCK_BYTES:
            path.chmod(0o644)
            with path.open("r+b") as file:
                file.seek(BLOCK_BYTES)
                rest = file.read()
                file.seek(BLOCK_BYTES)
                file.write(bytes(byte ^ 1 for byte in rest))
            altered.append(path.name)
    return altered


@pytest.mark.parametrize("packing", ["concatenate", "best_fit"])
def test_what_is_altered_in_the_cache_before_it_is_first_read_is_fetched_again(
    large: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, packing: str
) -> None:
    options = {"sequence_tokens": 256, "packing": packing}
    local = opened(LocalStore(large), **options)
    with serving(large) as server:
        dataset = opened(remote_store(server.address, tmp_path / "cache"), **options)
        firsts = np.cumsum(dataset.shard_samples) - dataset.shard_samples
        assert len(firsts) == 2
        dataset.gather(firsts)
        altered = alter_in_place(tmp_path / "cache")
        assert len(altered) == 2
        server.requests.clear()
        assert_same_samples(dataset, large, **options)
        names = sorted(entry.name for entry in shard_files(large) if entry.sha256 in altered)
        assert sorted(server.requests.elements()) == names
        for name in names:
            assert f"{server.address}/{name}: block " in caplog.text
        np.testing.assert_equal(dataset.content_hashes(firsts), local.content_hashes(firsts))


def test_images_that_are_altered_in_the_cache_before_they_are_first_read_are_fetched_again(tmp_path: Path) -> None:
    source = f"images:{write_images(tmp_path / 'pictures', count=100, size=(150, 150))}"
    directory = prepare(DataConfig(source=source, directory=tmp_path / "made", validation_fraction=0.2))
    with serving(directory) as server:
        dataset = opened(remote_store(server.address, tmp_path / "cache"), sequence_tokens=256)
        dataset.gather(np.arange(1))
        assert len(alter_in_place(tmp_path / "cache")) == 1
        assert_same_samples(dataset, directory, sequence_tokens=256)


def test_what_is_altered_in_the_cache_and_wrong_at_the_address_is_told(large: Path, tmp_path: Path) -> None:
    with serving(large) as server:
        dataset = opened(remote_store(server.address, tmp_path / "cache"), sequence_tokens=256)
        dataset.gather(np.arange(1))
        assert alter_in_place(tmp_path / "cache")
        server.always["train-00000.bin"] = Fault("flip", 3)
        with pytest.raises(CorruptData, match=f"{server.address}/train-00000.bin: fetched 3 times, and never"):
            dataset.gather(np.arange(dataset.samples))


def forged(prepared: Path, **changes: object) -> bytes:
    """The dataset's manifest with an entry of its first training shard changed, and hashes that fit."""
    manifest = json.loads((prepared / "manifest.json").read_text())["manifest"]
    manifest["splits"]["train"]["shards"][0]["data"].update(changes)
    document = {"fingerprint": fingerprint_of(manifest), "manifest": manifest}
    return (json.dumps(document, sort_keys=True, indent=1) + "\n").encode()


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "../secret"},
        {"name": "/etc/passwd"},
        {"name": ".."},
        {"name": "a\\b"},
        {"name": "\0"},
        {"bytes": 1 << 61},
        {"bytes": -1},
        {"bytes": 1 << 80},
        {"sha256": "../" * 21 + "a"},
        {"sha256": "A" * 64},
        {"blocks": []},
    ],
)
def test_a_forged_manifest_reads_nothing_outside(prepared: Path, tmp_path: Path, changes: dict[str, object]) -> None:
    (tmp_path / "served" / "set").mkdir(parents=True)
    (tmp_path / "served" / "secret").write_text("secret")
    (tmp_path / "served" / "set" / "manifest.json").write_bytes(forged(prepared, **changes))
    with serving(tmp_path / "served") as server:
        store = remote_store(f"{server.address}/set", tmp_path / "cache")
        with pytest.raises(ValueError, match=r"set/manifest.json: "):
            opened(store)
        assert list(server.requests) == ["set/manifest.json"]
    assert not (tmp_path / "cache").exists()


def test_names_are_quoted_in_urls(prepared: Path, tmp_path: Path) -> None:
    """A name that is plain to a file system may mean more to a server."""
    entry = shard_files(prepared)[0]
    for name in ("a?b=c", "a#b", "a%2e%2e", "a b", "ä"):
        shutil.copy(prepared / entry.name, tmp_path / name)
    with serving(tmp_path) as server:
        store = remote_store(server.address, tmp_path / "cache")
        for name in ("a?b=c", "a#b", "a%2e%2e", "a b", "ä"):
            shutil.rmtree(tmp_path / "cache", ignore_errors=True)
            with store.open(entry.model_copy(update={"name": name})) as file:
                assert file.read() == (prepared / entry.name).read_bytes()


def entry_named(number: int) -> FileEntry:
    return FileEntry(name=f"{number}", bytes=1, sha256=f"{number:064x}", blocks=("0" * 16,))


@settings(deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 6), max_size=4), max_size=40),
    st.lists(st.integers(0, 45), max_size=8),
)
def test_needs_know_the_next_use_of_every_file(looks: list[list[int]], stops: list[int]) -> None:
    needs = Needs()
    entries = [entry_named(number) for number in range(7)]
    for position, numbers in enumerate(looks):
        needs.expect(position, position + 1, [entries[number] for number in numbers])
    assert len(looks) < SAME_USE_LOOKS  # so that each file's sightings are one use, from the first to the last
    for reached in sorted(stops):
        needs.reached(reached)
        for number in range(7):
            seen = [position for position, numbers in enumerate(looks) if number in numbers]
            needed = bool(seen) and seen[-1] >= reached
            assert (entries[number] in needs) == needed
            if needed:
                assert needs.claims()[entries[number].sha256].distance == max(0, seen[0] - reached)
        distances = [distance for _, distance in needs.in_order()]
        assert distances == sorted(distances)


def test_uses_that_lie_far_apart_are_told_apart() -> None:
    needs, entry, other = Needs(), entry_named(1), entry_named(2)
    for position in itertools.chain(range(5), [500]):
        needs.expect(position, position + 1, [entry])
        for between in range(SAME_USE_LOOKS if position == 4 else 0):
            needs.expect(position + between, position + between + 1, [other])
    needs.reached(4)
    assert needs.claims()[entry.sha256].distance == 0
    needs.reached(5)
    assert needs.claims()[entry.sha256].distance == 495
    needs.reached(501)
    assert entry not in needs
