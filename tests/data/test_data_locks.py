"""Directories and locks while others delete what they lie in."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from data.locks import make_directory, take_lock

DELETE_AND_MAKE = """
import os, sys
from pathlib import Path
from data.locks import make_directory
while True:
    try:
        os.rmdir(sys.argv[1])
    except OSError:
        pass
    make_directory(Path(sys.argv[1]))
"""


def test_directories_are_made_while_others_delete_and_make_them(tmp_path: Path) -> None:
    others = [subprocess.Popen([sys.executable, "-c", DELETE_AND_MAKE, str(tmp_path / "a")]) for _ in range(2)]
    try:
        for _ in range(20_000):
            make_directory(tmp_path / "a")
            assert [other.poll() for other in others] == [None, None]
    finally:
        for other in others:
            other.kill()
            other.wait()


class DeletedForAMoment(type(Path())):  # type: ignore[misc]
    """A directory that another process deletes and makes again just when somebody asks whether it is one."""

    asked = False

    def is_dir(self) -> bool:
        self.asked, asked = True, self.asked
        return asked and super().is_dir()


def test_a_directory_that_is_deleted_for_a_moment_is_one(tmp_path: Path) -> None:
    path = DeletedForAMoment(tmp_path)
    make_directory(path)
    assert path.asked


def test_a_file_in_the_place_of_a_directory_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError):
        make_directory(tmp_path / "file")
    with pytest.raises(NotADirectoryError):
        make_directory(tmp_path / "file" / "below")


def test_a_lock_excludes_until_it_is_closed(tmp_path: Path) -> None:
    lock = take_lock(tmp_path / "new" / "lock", wait=False)
    assert lock is not None
    assert take_lock(tmp_path / "new" / "lock", wait=False) is None
    os.remove(tmp_path / "new" / "lock")
    other = take_lock(tmp_path / "new" / "lock", wait=False)  # of the file that lies there now
    assert other is not None
    other.close()
    lock.close()


@pytest.mark.parametrize("below", ["", "below"])
def test_a_link_that_leads_nowhere_is_an_error(tmp_path: Path, below: str) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "gone" / "target")
    with pytest.raises(FileExistsError, match=r"a link to what is not there: .*link"):
        make_directory(tmp_path / "link" / below)
    with pytest.raises(FileExistsError, match=r"a link to what is not there: .*link"):
        take_lock(tmp_path / "link" / below, wait=True)


def test_a_place_where_nothing_can_be_made_is_an_error() -> None:
    """The kernel says of it that what it lies in is missing, as if that had been deleted just now."""
    with pytest.raises(FileNotFoundError):
        make_directory(Path("/proc/nowhere"))
    with pytest.raises(FileNotFoundError):
        take_lock(Path("/proc/nowhere"), wait=True)
    with pytest.raises(FileNotFoundError):
        take_lock(Path("/proc/nowhere/lock"), wait=False)
