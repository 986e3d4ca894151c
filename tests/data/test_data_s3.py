"""Datasets on S3: the same samples as from the directory, whatever a real S3-compatible server and the network do."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.config import DataConfig
from data.dataset import open_dataset
from data.errors import CorruptData, Unavailable
from data.manifest import FileEntry
from data.prepare import prepare
from data.remote import RemoteStore
from data.samples import Dataset
from data.store import LocalStore, open_store, read_manifest
from data.verification import Verifier, items_of
from tests.data.data_helpers import token_config
from tests.data.faulty_s3 import serving_s3
from tests.data.faulty_server import Fault, FaultyServer

ADDRESS = "s3://bucket/sets/one"


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("prepared")
    return prepare(token_config(root, documents=220, shard_bytes=3000, tokenizer="bpe:300"))


@pytest.fixture(scope="module")
def running() -> Iterator[FaultyServer]:
    with serving_s3() as server:
        yield server


@pytest.fixture
def server(running: FaultyServer, monkeypatch: pytest.MonkeyPatch) -> FaultyServer:
    """The server without faults; where it is and who asks is in the environment."""
    running.faults.clear()
    running.always.clear()
    values = {
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": running.address,
        "AWS_MAX_ATTEMPTS": "1",  # botocore's own attempts would hide ours
        "NO_PROXY": "127.0.0.1",
    }
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    return running


@pytest.fixture(scope="module")
def client(running: FaultyServer, prepared: Path) -> Any:
    """Whoever alters what lies on the server, which holds the dataset at the beginning of each test."""
    import boto3

    client = boto3.client(
        "s3",
        endpoint_url=running.address,
        region_name="us-east-1",
        aws_access_key_id="testing",
        aws_secret_access_key="testing",
    )
    client.create_bucket(Bucket="bucket")
    for path in prepared.iterdir():
        client.upload_file(str(path), "bucket", f"sets/one/{path.name}")
    return client


def s3_store(cache: Path, address: str = ADDRESS, **changes: object) -> RemoteStore:
    values = {"directory": address, "cache_directory": cache, "download_pause_seconds": 0.001, "download_retries": 3}
    store = open_store(address, DataConfig.model_validate(values | changes))
    assert isinstance(store, RemoteStore)
    return store


def opened(store: RemoteStore | LocalStore) -> Dataset:
    return open_dataset(store, DataConfig(sequence_tokens=16), "train")


def shard_files(directory: Path) -> list[FileEntry]:
    return [file for shard in read_manifest(LocalStore(directory)).splits["train"].shards for file in shard.files()]


def assert_same_samples(remote: Dataset, directory: Path) -> None:
    local = opened(LocalStore(directory))
    ids = np.arange(local.samples)
    for found, expected in zip(remote.gather(ids), local.gather(ids), strict=True):
        np.testing.assert_equal(found, expected)


@pytest.mark.usefixtures("server")
def test_what_lies_on_the_server_is_what_counts(client: Any, prepared: Path, tmp_path: Path) -> None:
    late, altered, *others = shard_files(prepared)
    client.delete_object(Bucket="bucket", Key=f"sets/one/{late.name}")
    client.put_object(Bucket="bucket", Key=f"sets/one/{altered.name}", Body=b"x" * altered.bytes)
    store = s3_store(tmp_path / "cache", download_retries=1)
    for entry, part in ((late, "listed in the manifest but missing"), (altered, "never what the manifest lists")):
        with pytest.raises(CorruptData, match=part):
            store.open(entry)
        client.upload_file(str(prepared / entry.name), "bucket", f"sets/one/{entry.name}")
    client.put_object(Bucket="bucket", Key=f"sets/one/{others[0].name}", Body=b"x")
    with pytest.raises(CorruptData, match="bytes short of the manifest's"):
        store.open(others[0])
    client.upload_file(str(prepared / others[0].name), "bucket", f"sets/one/{others[0].name}")
    assert_same_samples(opened(store), prepared)
    assert store.names() == sorted(path.name for path in prepared.iterdir())
    with pytest.raises(ValueError, match="not a prepared dataset"):
        read_manifest(s3_store(tmp_path / "cache", "s3://bucket/sets/two"))


RECOVERS = [
    [Fault("status", status=500), Fault("status", status=503), Fault("status", status=503)],
    [Fault("status", status=404)],
    [Fault("reset", 0), Fault("reset", 1), Fault("reset", 1500)],
    [Fault("truncate", 0), Fault("truncate", 2000)],
    [Fault("flip", 10), Fault("flip", 2500)],
    [Fault("stall", 0), Fault("stall", 2000)],
    [Fault("slow")],
]


@pytest.mark.usefixtures("client")
def test_failures_that_pass_give_the_same_samples(server: FaultyServer, prepared: Path, tmp_path: Path) -> None:
    names = [entry.name for entry in shard_files(prepared) if entry.name.endswith(".bin")]
    assert len(names) > len(RECOVERS)
    faults = dict(zip(names, RECOVERS, strict=False)) | {"manifest.json": [Fault("status"), Fault("reset", 9)]}
    server.faults.update({name: list(of_file) for name, of_file in faults.items()})
    # Of a busy machine an answer may come after the timeout too: more tries than there are faults.
    store = s3_store(tmp_path / "cache", download_timeout_seconds=1, download_retries=12)
    assert_same_samples(opened(store), prepared)
    assert not any(server.faults.values())


@pytest.mark.usefixtures("client")
@pytest.mark.parametrize(
    ("fault", "kind", "part"),
    [
        (Fault("status", status=500), Unavailable, "cannot be read ("),
        (Fault("status", status=403), Unavailable, "access is denied ("),
        (Fault("status", status=404), CorruptData, "listed in the manifest but missing"),
        (Fault("reset", 10), Unavailable, "cannot be read ("),
        (Fault("stall", 10), Unavailable, "(nothing, or too little, within data.download_timeout_seconds); is the"),
        (Fault("flip", 10), CorruptData, "fetched 3 times, and never what the manifest lists"),
        (Fault("truncate", 10), CorruptData, "fetched 3 times, and never what the manifest lists"),
    ],
    ids=["500", "403", "404", "reset", "stall", "flip", "truncate"],
)
def test_failures_that_stay_are_told_in_a_line(
    server: FaultyServer, prepared: Path, tmp_path: Path, fault: Fault, kind: type[ValueError], part: str
) -> None:
    entry = shard_files(prepared)[0]
    # Only what never comes may take longer than that: any answer of a busy machine may.
    hurry = {"download_timeout_seconds": 0.2} if fault.kind == "stall" else {}
    server.always[entry.name] = fault
    with pytest.raises(kind) as raised:
        s3_store(tmp_path / "cache", download_retries=0, **hurry).open(entry)
    assert type(raised.value) is kind
    assert str(raised.value).startswith(f"{ADDRESS}/{entry.name}: ")
    assert part in str(raised.value)
    assert "\n" not in str(raised.value)
    del server.always[entry.name]
    with s3_store(tmp_path / "cache", download_retries=0).open(entry) as file:
        assert file.read() == (prepared / entry.name).read_bytes()


@pytest.mark.usefixtures("client")
def test_a_manifest_that_comes_altered_every_time_is_corrupt(server: FaultyServer, tmp_path: Path) -> None:
    server.always["manifest.json"] = Fault("flip", 40)
    with pytest.raises(CorruptData, match=r"one/manifest\.json: not what its server has a checksum of"):
        read_manifest(s3_store(tmp_path / "cache", download_retries=1))


@pytest.mark.usefixtures("client")
def test_verifying_what_may_not_be_read_finds_no_bytes_at_fault(server: FaultyServer, prepared: Path) -> None:
    (first, *_) = items_of(read_manifest(LocalStore(prepared)))
    verifier = Verifier(ADDRESS)
    server.always[first.files[0].name] = Fault("status", status=403)
    with pytest.raises(Unavailable, match="access is denied"):
        verifier(first)
    server.always.clear()
    assert verifier(first).problems == ()
