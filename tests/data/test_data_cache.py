"""The cache of whole files: killed, filled, shared, altered and deleted, it gives the right bytes or a reason."""

import json
import os
import random
import resource
import shutil
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from io import FileIO
from pathlib import Path

import pytest

from data.cache import NOW, ShardCache
from data.claims import Claim, Claims
from data.download import Patience, download
from data.errors import NoRoom, Unavailable
from data.locks import take_lock
from data.manifest import FileEntry
from data.shards import HashingFile

PATIENCE = Patience(retries=0)
PIECE = 1000


class LocalSource:
    """A file of this machine as a remote one, read in small pieces; `reads` counts how often it was begun at which byte."""

    def __init__(self, path: Path) -> None:
        self.path, self.address = path, str(path)
        self.reads: list[int] = []

    def read_from(self, start: int) -> tuple[int, Iterator[bytes]]:
        self.reads.append(start)
        content = self.path.read_bytes()[start:]
        return start, iter([content[at : at + PIECE] for at in range(0, len(content), PIECE)])


class Files:
    """Files to be cached, each of other content, and what it takes to download them."""

    def __init__(self, directory: Path, *, count: int = 6, size: int = 5000) -> None:
        self.entries: list[FileEntry] = []
        self.sources: list[LocalSource] = []
        directory.mkdir()
        for number in range(count):
            with HashingFile(directory / f"{number}.bin") as file:
                file.write(random.Random(number).randbytes(size))
                self.entries.append(file.finish())
            self.sources.append(LocalSource(directory / f"{number}.bin"))

    def fill(self, number: int) -> Callable[..., None]:
        return lambda file, make_room: download(self.sources[number], self.entries[number], file, PATIENCE, make_room)

    def open(self, cache: ShardCache, number: int) -> FileIO:
        return cache.open(self.entries[number], self.fill(number))

    def read(self, cache: ShardCache, number: int) -> bytes:
        with self.open(cache, number) as file:
            return file.read()

    def bring(self, cache: ShardCache, number: int, next_use: int) -> str:
        return cache.bring(self.entries[number], self.fill(number), next_use)

    def held(self, cache: ShardCache) -> list[int]:
        return [number for number, entry in enumerate(self.entries) if cache.holds(entry)]

    def content(self, number: int) -> bytes:
        return self.sources[number].path.read_bytes()

    def claims(self, distances: dict[int, int]) -> dict[str, Claim]:
        return {self.entries[number].sha256: Claim(at, self.entries[number].bytes) for number, at in distances.items()}


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path / "remote")


def cache_of(tmp_path: Path, limit_bytes: int = 1 << 30) -> ShardCache:
    return ShardCache(tmp_path / "cache", limit_bytes)


def in_a_child(action: Callable[[], object]) -> int:
    """Run `action` in a forked process; how that ended: 0, the negative signal, or 1 with a traceback."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            action()
            code = 0
        except BaseException:
            sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_file_is_fetched_once_and_found_again(tmp_path: Path, files: Files) -> None:
    cache = cache_of(tmp_path)
    assert files.read(cache, 0) == files.content(0)
    assert files.read(cache_of(tmp_path), 0) == files.content(0)
    assert files.sources[0].reads == [0]
    assert files.bring(cache, 0, 5) == "here"
    assert files.bring(cache, 1, 5) == "here"
    assert files.held(cache) == [0, 1]
    assert list((tmp_path / "cache" / "partial").iterdir()) == []
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "cache" / "files").iterdir()}
    assert modes == {0o444}  # against what writes there by mistake


@pytest.mark.parametrize("damage", ["flipped", "cut", "grown", "emptied"])
def test_a_file_that_was_altered_in_the_cache_is_fetched_again(tmp_path: Path, files: Files, damage: str) -> None:
    cache = cache_of(tmp_path)
    files.open(cache, 0).close()
    path = tmp_path / "cache" / "files" / files.entries[0].sha256
    content = bytearray(path.read_bytes())
    content[4321] ^= 16
    path.chmod(0o644)
    path.write_bytes(
        {"flipped": content, "cut": content[:-1], "grown": files.content(0) + b"x", "emptied": b""}[damage]
    )
    assert files.read(cache, 0) == files.content(0)
    assert files.sources[0].reads == [0, 0]


@pytest.mark.long
def test_killed_at_every_system_call_it_goes_on_from_there(tmp_path: Path, files: Files) -> None:
    """A child dies at its k-th call that touches the file system, for every k until it survives."""
    survived, deaths, resumed = False, 0, 0
    limit = 3 * 5000
    while not survived:
        deaths += 1

        def fetch_three(at: int = deaths) -> None:
            seen = 0

            def die(event: str, arguments: tuple[object, ...]) -> None:
                nonlocal seen
                if event in ("open", "os.rename", "os.remove", "os.mkdir", "fcntl.flock", "os.truncate", "os.listdir"):
                    seen += 1
                    if seen == at:
                        os.kill(os.getpid(), signal.SIGKILL)

            cache = cache_of(tmp_path, limit)
            sys.addaudithook(die)
            cache.claim(files.claims({3: 7}))
            assert files.bring(cache, 3, 7) == "here"
            # Evicts what earlier children left, the file fetched ahead last.
            assert [files.read(cache, number) for number in (0, 1, 2)] == [files.content(n) for n in (0, 1, 2)]

        code = in_a_child(fetch_three)
        assert code in (0, -signal.SIGKILL)
        survived = code == 0
        resumed += len(list((tmp_path / "cache").glob("partial/*")))
        again = cache_of(tmp_path, limit)
        number = deaths % 5
        assert files.read(again, number) == files.content(number)
        again.claim({})
        again._make_room(NOW)
        assert again.used_bytes() <= limit
        shutil.rmtree(tmp_path / "cache")
    assert deaths > 20
    assert resumed > 5


def test_a_download_that_was_broken_off_is_resumed(tmp_path: Path, files: Files) -> None:
    for written in (0, 1, PIECE, 4999):
        cache = cache_of(tmp_path / str(written))

        def die_after(written: int = written, cache: ShardCache = cache) -> None:
            def write_and_die(file: FileIO, make_room: object) -> None:
                file.write(files.content(0)[:written])
                os.kill(os.getpid(), signal.SIGKILL)

            cache.open(files.entries[0], write_and_die)

        assert in_a_child(die_after) == -signal.SIGKILL
        files.sources[0].reads.clear()
        assert files.read(cache, 0) == files.content(0)
        assert files.sources[0].reads == [written]


def test_a_broken_beginning_is_not_built_upon(tmp_path: Path, files: Files) -> None:
    cache = cache_of(tmp_path)
    for beginning in (b"x" * 2000, b"x" * 5000, b"x" * 6000, files.content(0)):
        partial = tmp_path / "cache" / "partial" / f"{files.entries[0].sha256}.5000"
        partial.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(beginning)
        assert files.read(cache, 0) == files.content(0)
        shutil.rmtree(tmp_path / "cache")


SHARE = """
import json, random, sys
from pathlib import Path
from tests.data.test_data_cache import Files, cache_of
from data.cache import ShardCache
from data.download import Patience, download
root, seed, limit, rounds = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
files = Files(root / f"remote-{seed}", count=8)
cache = cache_of(root, limit)
choose = random.Random(seed)
for _ in range(rounds):
    number = choose.randrange(8)
    cache.claim(files.claims({wanted: choose.randrange(100) for wanted in choose.sample(range(8), 3)}))
    if choose.random() < 0.3:
        files.bring(cache, choose.randrange(8), choose.randrange(100))
    assert files.read(cache, number) == files.content(number), number
print(json.dumps(sum(len(source.reads) for source in files.sources)))
"""


def share(root: Path, *, processes: int, limit: int, rounds: int) -> "list[subprocess.Popen[str]]":
    return [
        subprocess.Popen(
            [sys.executable, "-c", SHARE, str(root), str(seed), str(limit), str(rounds)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for seed in range(processes)
    ]


def test_processes_that_want_the_same_files_fetch_each_once(tmp_path: Path) -> None:
    running = share(tmp_path, processes=3, limit=1 << 30, rounds=150)
    told = [process.communicate(timeout=240) for process in running]
    assert [process.returncode for process in running] == [0, 0, 0], told
    assert sum(int(out) for out, _ in told) == 8


def test_processes_share_a_cache_smaller_than_what_each_needs(tmp_path: Path) -> None:
    limit = 3 * 5000
    running = share(tmp_path, processes=3, limit=limit, rounds=250)
    told = [process.communicate(timeout=240) for process in running]
    assert [process.returncode for process in running] == [0, 0, 0], told
    assert sum(int(out) for out, _ in told) > 24  # it was too small indeed
    cache = cache_of(tmp_path, limit)
    assert cache.used_bytes() <= limit


def test_a_cache_that_is_deleted_again_and_again_gives_the_right_bytes(tmp_path: Path) -> None:
    running = share(tmp_path, processes=2, limit=4 * 5000, rounds=400)
    deletions = 0
    while any(process.poll() is None for process in running):
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)
        deletions += 1
    told = [process.communicate(timeout=240) for process in running]
    assert [process.returncode for process in running] == [0, 0], told
    assert deletions > 10


def test_what_is_needed_last_is_evicted_first(tmp_path: Path, files: Files) -> None:
    cache = cache_of(tmp_path, 4 * 5000)
    for number in (3, 0, 1, 2):
        files.open(cache, number).close()
    for age, number in enumerate((2, 1, 0, 3)):
        os.utime(tmp_path / "cache" / "files" / files.entries[number].sha256, (age, age))
    cache.claim(files.claims({0: 10, 1: 0, 2: 500}))
    files.open(cache, 4).close()
    assert files.held(cache) == [0, 1, 2, 4]  # 3 is not claimed, though it was used last
    cache.claim(files.claims({0: 10, 1: 0, 2: 500, 4: 0, 5: 11}))
    assert files.bring(cache, 5, 11) == "here"
    assert files.held(cache) == [0, 1, 4, 5]
    assert files.bring(cache, 2, 500) == "no room"
    cache.claim(files.claims({0: 10, 1: 0, 3: 12, 4: 0, 5: 11}))
    assert files.bring(cache, 3, 12) == "no room"
    assert files.held(cache) == [0, 1, 4, 5]  # nothing was sacrificed for it
    # Nor is a file fetched that must go again for one that is needed before it and is not here yet.
    (tmp_path / "cache" / "files" / files.entries[0].sha256).unlink()
    assert files.bring(cache, 3, 12) == "no room"
    files.open(cache, 0).close()
    assert cache.used_bytes() == 4 * 5000
    files.open(cache, 3).close()  # needed at once: what is in use now goes last
    files.open(cache, 2).close()
    files.open(cache, 3).close()
    assert 1 in files.held(cache)
    assert cache.used_bytes() == 4 * 5000


def test_claims_of_the_living_protect_and_those_of_the_dead_do_not(tmp_path: Path, files: Files) -> None:
    cache = cache_of(tmp_path, 2 * 5000)
    claim_and_wait = (
        "import sys; from pathlib import Path; from data.claims import Claims; c = Claims(Path(sys.argv[1]));"
        "c.publish({sys.argv[2]: (3, 5000)}); print('claimed', flush=True); sys.stdin.read()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", claim_and_wait, str(tmp_path / "cache" / "claims"), files.entries[0].sha256],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"claimed\n"
    for number in (0, 1):
        files.open(cache, number).close()
    assert files.bring(cache, 2, 10) == "here"
    assert files.held(cache) == [0, 2]
    cache.claim(files.claims({2: 2}))
    assert files.bring(cache, 3, 10) == "no room"
    process.kill()
    process.communicate()
    assert files.bring(cache, 3, 10) == "here"
    assert files.held(cache) == [2, 3]
    own = {path.name.partition(".")[0] for path in (tmp_path / "cache" / "claims").iterdir()}
    assert len(own) == 1  # the dead one's are removed


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[1]", b'{"a": "b", "c": [1], "d": [1, "2"]}', b"\xff\xfe", b"[" * 100_000]
)
def test_damaged_claims_protect_nothing_and_break_nothing(tmp_path: Path, content: bytes) -> None:
    lock = take_lock(tmp_path / "other.lock", wait=True)
    (tmp_path / "other.json").write_bytes(content)
    assert Claims(tmp_path).of_others() == {}
    (tmp_path / "other.json").write_text(json.dumps({"a": [3, 4]}))
    assert Claims(tmp_path).of_others() == {"a": Claim(3, 4)}
    assert lock is not None


def test_what_dead_processes_began_gives_way(tmp_path: Path, files: Files) -> None:
    cache = cache_of(tmp_path, 2 * 5000)
    partial = tmp_path / "cache" / "partial"
    partial.mkdir(parents=True)
    (partial / f"{files.entries[5].sha256}.5000").write_bytes(b"begun")
    (partial / f"{files.entries[4].sha256}.5000").write_bytes(b"begun")
    in_work = take_lock(partial / f"{files.entries[4].sha256}.5000", wait=True)
    assert files.read(cache, 0) == files.content(0)
    assert [path.name for path in partial.iterdir()] == [f"{files.entries[4].sha256}.5000"]
    assert in_work is not None


def test_a_reader_of_an_evicted_file_is_not_disturbed(tmp_path: Path, files: Files) -> None:
    cache = cache_of(tmp_path, 5000)
    with files.open(cache, 0) as first:
        files.open(cache, 1).close()
        assert files.held(cache) == [1]
        assert first.read() == files.content(0)


def test_threads_of_one_process_fetch_a_file_once(tmp_path: Path, files: Files) -> None:
    cache = cache_of(tmp_path)
    found: list[bytes] = []
    threads = [threading.Thread(target=lambda: found.append(files.read(cache, 0))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [files.content(0)] * 8
    assert files.sources[0].reads == [0]


def test_a_file_that_the_disk_does_not_take_is_told(tmp_path: Path, files: Files) -> None:
    def fetch_with_a_limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2500, 2500))
        cache = cache_of(tmp_path)
        with pytest.raises(NoRoom, match=r"cache: File too large, and nothing more can be evicted; .*cache_directory"):
            files.read(cache, 0)
        assert files.bring(cache, 1, 0) == "no room"

    assert in_a_child(fetch_with_a_limit) == 0
    # The second attempt to fetch took the place that the first one's beginning had.
    assert [path.stat().st_size for path in (tmp_path / "cache" / "partial").iterdir()] == [2500]
    assert [files.read(cache_of(tmp_path), number) for number in (0, 1)] == [files.content(0), files.content(1)]
    assert [files.sources[number].reads for number in (0, 1)] == [[0], [2500]]


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk takes root")
def test_a_full_disk_evicts_and_then_tells(tmp_path: Path) -> None:
    files = Files(tmp_path / "remote", count=8, size=300_000)
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("this machine does not let tests mount a small disk")
    try:
        cache = ShardCache(disk / "cache", 1 << 30)
        for number in (*range(8), *range(8)):
            assert files.read(cache, number) == files.content(number)
        assert files.held(cache) == [5, 6, 7]
        cache.claim(files.claims({5: 0, 6: 0, 7: 0}))
        assert files.bring(cache, 0, 5) == "no room"  # does not push out what is needed before it
        assert files.held(cache) == [5, 6, 7]
        shutil.rmtree(disk / "cache")
        (disk / "thesis").write_bytes(bytes(900_000))
        with pytest.raises(NoRoom, match="No space left on device, and nothing more can be evicted"):
            files.read(cache, 0)
        (disk / "thesis").unlink()
        assert files.read(cache, 0) == files.content(0)
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_a_place_that_cannot_be_written_is_told(tmp_path: Path, files: Files) -> None:
    (tmp_path / "cache").write_text("not a directory")
    with pytest.raises(ValueError, match=r"Not a directory; set data\.cache_directory"):
        files.read(cache_of(tmp_path), 0)


def no_link_to(path: Path) -> None:
    path.symlink_to(path.parent / "gone" / "target")


def link_to_itself(path: Path) -> None:
    path.symlink_to(path)


@pytest.mark.parametrize(
    ("place", "make", "why"),
    [
        ("cache", no_link_to, r"cache: a link to what is not there; set data\.cache_directory"),
        ("cache", link_to_itself, r"Too many levels of symbolic links; set data\.cache_directory"),
        ("cache/lock", no_link_to, r"lock: a link to what is not there; set data\.cache_directory"),
        ("cache/lock", Path.mkdir, r"lock: Is a directory; set data\.cache_directory"),
        ("cache/files", Path.touch, r"Not a directory; set data\.cache_directory"),
    ],
)
def test_a_place_that_cannot_be_used_is_told(
    tmp_path: Path, files: Files, place: str, make: Callable[[Path], None], why: str
) -> None:
    (tmp_path / place).parent.mkdir(exist_ok=True)
    make(tmp_path / place)
    with pytest.raises(ValueError, match=why):
        files.read(cache_of(tmp_path), 0)
    with pytest.raises(ValueError, match=why):
        files.bring(cache_of(tmp_path), 0, 5)


def test_a_place_where_nothing_can_be_made_is_told(files: Files) -> None:
    with pytest.raises(ValueError, match=r"/proc/nowhere.*: No such file or directory; set data\.cache_directory"):
        files.read(ShardCache(Path("/proc/nowhere"), 1 << 30), 0)


def test_too_many_open_files_are_told(tmp_path: Path, files: Files) -> None:
    def open_with_a_limit() -> None:
        held = [os.open(tmp_path, os.O_RDONLY)]
        resource.setrlimit(resource.RLIMIT_NOFILE, (held[0] + 1, held[0] + 1))
        with pytest.raises(Unavailable, match="Too many open files; raise the limit of open files"):
            files.read(cache_of(tmp_path), 0)

    assert in_a_child(open_with_a_limit) == 0
