"""The code of a user's own that a job needs: the models and tasks that its recipe names, and what lies beside them. Imports
no torch, and none of that code."""

from __future__ import annotations

import ast
import importlib.util
import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from launch.submit_script import PACKAGES

MOST_BYTES = 64 * 2**20


@dataclass(frozen=True)
class OwnCode:
    """Files to be copied, each with its place in the copy."""

    files: dict[Path, Path]

    def copy_to(self, folder: Path) -> None:
        for place, source in self.files.items():
            copy = folder / place
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, copy)


def find_own_code(kinds: Iterable[str]) -> OwnCode:
    """What the functions `package.module:function` need of what lies below the current directory: packages whole, with the
    data files beside their code, and modules; the same of each package and module that these import, on and on.

    Imports are read from the sources. Two things are not seen: a module that is imported by a name that is made at run
    time, and a data file beside a module that stands alone; in a package both are copied. What lies elsewhere, or is
    installed in an environment, stays there. Raises ValueError where it is too much to be code.
    """
    files: dict[Path, Path] = {}
    waiting = [_top(kind.partition(":")[0]) for kind in kinds if ":" in kind]
    seen = {"__main__", *PACKAGES, *sys.stdlib_module_names}
    while waiting:
        name = waiting.pop()
        if name not in seen:
            seen.add(name)
            found = dict(_files_of(name))
            files |= found
            waiting += [imported for source in found.values() for imported in _imports_of(source)]
    _refuse_too_much(files)
    return OwnCode(files)


def _files_of(name: str) -> Iterator[tuple[Path, Path]]:
    """Of a top package or module: each file's place in a copy, and where it lies; none for one that lies elsewhere."""
    spec = importlib.util.find_spec(name)
    if spec is None:
        return
    packages = [Path(place) for place in spec.submodule_search_locations or () if _is_own(Path(place))]
    for package in packages:
        below = list(_walk(package, set()))
        # A folder that only has the name of something that is not installed is no code.
        if any(path.suffix == ".py" for path in below):
            yield from ((Path(name) / path.relative_to(package), path) for path in below)
    if not packages and spec.origin is not None and _is_own(Path(spec.origin)):
        yield Path(Path(spec.origin).name), Path(spec.origin)


def _is_own(path: Path) -> bool:
    here, environment = Path.cwd().resolve(), Path(sys.prefix).resolve()
    return path.exists() and path.resolve().is_relative_to(here) and not path.resolve().is_relative_to(environment)


def _walk(folder: Path, entered: set[Path]) -> Iterator[Path]:
    """The files below a folder, without caches, environments, and what begins with a dot, such as .git."""
    entered.add(folder.resolve())
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        path = Path(entry.path)
        if entry.name.startswith(".") or entry.name == "__pycache__":
            continue
        if entry.is_file():
            yield path
        elif entry.is_dir() and not (path / "pyvenv.cfg").exists() and path.resolve() not in entered:
            yield from _walk(path, entered)


def _imports_of(source: Path) -> set[str]:
    """The top packages and modules that a file imports, wherever in it."""
    if source.suffix != ".py":
        return set()
    try:
        nodes = list(ast.walk(ast.parse(source.read_bytes())))
    except (SyntaxError, ValueError):
        return set()  # nobody can import it
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module and not node.level]
    return {_top(name) for name in names}


def _top(name: str) -> str:
    return name.partition(".")[0]


def _refuse_too_much(files: dict[Path, Path]) -> None:
    sizes = {source: source.stat().st_size for source in files.values()}
    if (total := sum(sizes.values())) > MOST_BYTES:
        largest = max(sizes, key=sizes.__getitem__)
        raise ValueError(
            f"your own code is copied for the job, and has {total / 2**20:,.0f} MiB, more than {MOST_BYTES / 2**20:.0f}: "
            f"move what is no code out of its package, first of all {largest} ({sizes[largest] / 2**20:,.0f} MiB)"
        )
