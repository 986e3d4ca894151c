"""Reading a recipe: YAML plus `section.key=value` overrides, and one clear line for whatever is wrong. Imports no torch."""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from distrib.deepspeed_config import check_deepspeed_file
from launch.config import RunConfig
from models.config import model_config_class
from models.user_code import require_package

SHIPPED_RECIPES = Path(__file__).parent / "recipes"
_NUMBER_LIKE = re.compile(r"[-+.\d][-+.\d_eE]*|true|false|null", re.IGNORECASE)
_Section = TypeVar("_Section", bound=BaseModel)


class _RecipeLoader(yaml.SafeLoader):
    """YAML as people mean it: `off` is a word, `1e-3` is a number, and a key given twice is a mistake."""


_RecipeLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":bool", ":float", ":int", ":timestamp"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_RecipeLoader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(true|false)$", re.IGNORECASE), list("tTfF")
)
_RecipeLoader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?[0-9][0-9_]*$"), list("-+0123456789"))
_RecipeLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9]*)?)([eE][-+]?[0-9]+)?$"),
    list("-+.0123456789"),
)


def _construct_decimal(loader: _RecipeLoader, node: yaml.ScalarNode) -> int:
    # YAML 1.1 reads 0123 as octal; nobody means that.
    return int(str(loader.construct_scalar(node)).replace("_", ""))


def _construct_mapping(loader: _RecipeLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    mapping: dict[Any, Any] = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        if key in mapping:
            raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
        mapping[key] = loader.construct_object(value_node, deep=True)
    return mapping


_RecipeLoader.add_constructor("tag:yaml.org,2002:int", _construct_decimal)
_RecipeLoader.add_constructor("tag:yaml.org,2002:map", _construct_mapping)


def load_recipe(recipe: str, overrides: Sequence[str] = ()) -> RunConfig:
    """The configuration of a shipped recipe's name or a YAML file's path, with `section.key=value` overrides.

    Raises ValueError in one line: the key, its value and the nearest valid names.
    """
    path = find_recipe(recipe)
    mapping = _read_sections(path)
    for override in overrides:
        _apply_override(mapping, override)
    config = parse_recipe(mapping, source=f"recipe {path.stem if path.parent == SHIPPED_RECIPES else path}")
    for key, kind in (("model.kind", config.model.kind), ("task.kind", config.task.kind)):
        if ":" in kind:
            require_package(kind, key)
    check_deepspeed_file(
        config.parallel,
        config.optimizer,
        config.schedule,
        global_samples=config.batch.global_samples,
        micro_samples=config.batch.micro_samples,
    )
    return config


def recipe_of_run(run_directory: Path) -> RunConfig:
    """The resolved recipe of a run. ValueError in one line where there is no run, or its recipe is damaged."""
    path = run_directory / "recipe.yaml"
    if not path.is_file():
        raise ValueError(
            f"{run_directory}: not a run of Lockstep (no recipe.yaml); give a directory such as runs/NAME-0001"
        )
    return parse_recipe(_read_sections(path), source=f"recipe {path}")


def _read_sections(path: Path) -> dict[Any, Any]:
    """What a recipe's file holds. ValueError where that is not text, not YAML, or no sections."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"recipe {path}: cannot be read ({error})") from None
    mapping = parse_yaml(text, f"recipe {path}")
    if not isinstance(mapping, dict):
        raise ValueError(f"recipe {path}: must hold sections (model:, data:, ...), not {type(mapping).__name__}")
    return mapping


def find_recipe(recipe: str) -> Path:
    """The file of a recipe given by path or by the name of a shipped one."""
    path = Path(recipe)
    if path.suffix in (".yaml", ".yml") or "/" in recipe:
        if not path.is_file():
            raise ValueError(f"recipe {recipe}: no such file")
        return path
    shipped = {file.stem: file for file in sorted(SHIPPED_RECIPES.glob("*.yaml"))}
    if recipe not in shipped:
        near = difflib.get_close_matches(recipe, shipped, n=3, cutoff=0.4)
        hint = f"nearest: {', '.join(near)}; " if near else ""
        raise ValueError(
            f"recipe {recipe!r} is unknown; {hint}shipped: {', '.join(shipped)}; or give a path to a .yaml"
        )
    return shipped[recipe]


def parse_yaml(text: str, source: str) -> Any:
    """A YAML document, safely. Raises ValueError with the line."""
    loader = _RecipeLoader(text)
    try:
        return loader.get_single_data()
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ValueError(f"{source}{line}: {error.problem}") from None
    except RecursionError:
        raise ValueError(f"{source}: not valid YAML (nested too deeply)") from None
    except (yaml.YAMLError, ValueError, TypeError) as error:
        raise ValueError(f"{source}: not valid YAML ({error})") from None
    finally:
        loader.dispose()


def parse_recipe(mapping: Mapping[str, Any], source: str) -> RunConfig:
    """The configuration that a mapping of sections describes. Raises ValueError in one line."""
    sections = {name: field.annotation for name, field in RunConfig.model_fields.items()}
    for name, section in mapping.items():
        if name not in sections:
            raise ValueError(f"{source}: {_unknown_key('', str(name), section, list(sections))}")
        if not isinstance(section, Mapping):
            raise ValueError(f"{source}: {name}={section!r}: must be a section of keys, such as `{name}: {{...}}`")
        section_class = sections[name]
        if name == "model":
            kind = section.get("kind")
            if not isinstance(kind, str):
                raise ValueError(f"{source}: model.kind={kind!r}: must name a model, such as transformer")
            try:
                section_class = model_config_class(kind)
            except ValueError as error:
                raise ValueError(f"{source}: {error}") from None
        assert isinstance(section_class, type)
        parse_section(section_class, section, prefix=f"{name}.", source=source)
    return parse_section(RunConfig, mapping, prefix="", source=source)


def dump_recipe(config: RunConfig) -> str:
    """The resolved recipe as YAML: every key spelled out; reading it back gives the same configuration."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def hash_recipe(config: RunConfig) -> str:
    """sha256, in hex, of the resolved recipe."""
    return hashlib.sha256(json.dumps(config.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()


def parse_section(section_class: type[_Section], mapping: Mapping[str, Any], *, prefix: str, source: str) -> _Section:
    """A section as its frozen configuration. Raises ValueError in one line, where `prefix` leads to the section's keys."""
    try:
        # Through JSON and strictly: lists become tuples and strings paths, but `steps: true` is no number.
        return section_class.model_validate_json(json.dumps(mapping), strict=True)
    except TypeError as error:
        raise ValueError(f"{source}: {prefix.rstrip('.')}: {error}") from None
    except ValidationError as error:
        raise ValueError(f"{source}: {_describe(error, section_class, prefix)}") from None


def _describe(error: ValidationError, section_class: type[BaseModel], prefix: str) -> str:
    details = error.errors(include_url=False)
    # An unknown key is most often the misspelling of one that is then missing: name it first.
    first = min(details, key=lambda detail: detail["type"] != "extra_forbidden")
    location = [str(part) for part in first["loc"]]
    dotted = prefix + ".".join(location) if location else prefix.rstrip(".")
    if first["type"] == "extra_forbidden":
        parent = ".".join([prefix.rstrip("."), *location[:-1]]).strip(".")
        return _unknown_key(parent, location[-1], first["input"], _keys_at(section_class, location[:-1]))
    if first["type"] == "missing":
        return f"{dotted} is missing and has no default"
    message = first["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    if first["type"] == "value_error":
        return f"{dotted}: {message}" if dotted else message
    return f"{dotted}={_show(first['input'])}: {message}"


def _unknown_key(section: str, key: str, value: Any, valid: list[str]) -> str:
    dotted = f"{section}.{key}" if section else key
    near = [f"{section}.{name}" if section else name for name in difflib.get_close_matches(key, valid, n=3, cutoff=0.5)]
    if not near:
        near = _same_key_elsewhere(key)
    nearest = f"nearest: {', '.join(near)}; " if near else ""
    place = f"section {section}" if section else "a recipe"
    return f"{dotted}={_show(value)}: unknown key; {nearest}{place} has: {', '.join(valid)}"


def _same_key_elsewhere(key: str) -> list[str]:
    """`section.key` for the sections that have this very key: it may stand in the wrong one."""
    return [
        f"{name}.{key}"
        for name, field in RunConfig.model_fields.items()
        if isinstance(field.annotation, type) and key in getattr(field.annotation, "model_fields", {})
    ]


def _keys_at(section_class: type[BaseModel], location: list[str]) -> list[str]:
    """The valid keys of the section, or of a section within it."""
    keys = section_class.model_fields
    parts = iter(location)
    for part in parts:
        annotation = keys[part].annotation if part in keys else None
        candidates = [annotation, *getattr(annotation, "__args__", ())]
        if get_origin(annotation) is dict:
            next(parts, None)  # a name that the user chose
        inner = [c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)]
        if not inner:
            return []
        keys = inner[0].model_fields
    return list(keys)


def _apply_override(mapping: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    parts = key.split(".")
    if not separator or len(parts) < 2 or not all(parts):
        raise ValueError(f"override {override!r}: must have the form section.key=value, such as run.steps=100")
    value = parse_yaml(text, f"override {override!r}") if text else ""
    inner: Any = mapping
    for part in parts[:-1]:
        inner = inner.setdefault(part, {})
        if not isinstance(inner, dict):
            raise ValueError(f"override {override!r}: {part} is not a section")
    inner[parts[-1]] = value


def _show(value: Any) -> str:
    # In quotes where it would read as something else without them: run.steps='3' is no number.
    plain = isinstance(value, str) and not (_NUMBER_LIKE.fullmatch(value) or value == "")
    shown = value if plain else json.dumps(value, default=str, ensure_ascii=False)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."
