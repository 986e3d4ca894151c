"""What a submitted job needs, copied beside it, so that later edits do not change a job that waits. Imports no torch."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

from launch.config import RunConfig
from launch.recipe import dump_recipe
from launch.submit_script import CHECKOUT

PACKAGES = ("launch", "distrib", "models", "data", "slurm")
_CODE = (".py", ".sh", ".sbatch", ".yaml", ".html", ".css")
CODE_DIRECTORY = "code"
RECIPE_FILE = "recipe.yaml"


def take_snapshot(config: RunConfig, folder: Path) -> None:
    """Writes `code/` and `recipe.yaml` into `folder`: Lockstep itself, the user's own model or task where the recipe names
    one that lies where they stand, and the resolved recipe."""
    code = folder / CODE_DIRECTORY
    for package in PACKAGES:
        _copy_code(CHECKOUT / package, code / package)
    for kind in (config.model.kind, config.task.kind):
        if ":" in kind:
            _copy_own_code(kind, code)
    config = _with_own_deepspeed_file(config, folder)
    (folder / RECIPE_FILE).write_text(dump_recipe(config), encoding="utf-8")


def _copy_code(source: Path, target: Path) -> None:
    """Sources and what a package ships beside them: a dataset that somebody keeps in there is not copied."""
    for path in sorted(source.rglob("*")):
        if path.is_file() and path.suffix in _CODE:
            copy = target / path.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)


def _copy_own_code(kind: str, code: Path) -> None:
    """The top package or module of `package.module:function`, where it lies below the current directory; what is installed
    elsewhere stays there."""
    top = kind.partition(":")[0].partition(".")[0]
    spec = importlib.util.find_spec(top)
    assert spec is not None  # load_recipe has found it
    places = [Path(place) for place in spec.submodule_search_locations or ()]
    if places:
        if places[0].resolve().is_relative_to(Path.cwd().resolve()):
            _copy_code(places[0], code / top)
    elif spec.origin is not None and Path(spec.origin).resolve().is_relative_to(Path.cwd().resolve()):
        shutil.copyfile(spec.origin, code / Path(spec.origin).name)


def _with_own_deepspeed_file(config: RunConfig, folder: Path) -> RunConfig:
    file = config.parallel.deepspeed_config
    if file is None:
        return config
    copy = folder / "deepspeed.json"
    shutil.copyfile(file, copy)
    parallel = config.parallel.model_copy(update={"deepspeed_config": copy})
    return config.model_copy(update={"parallel": parallel})
