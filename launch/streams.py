"""The datasets of a recipe's streams: opened where they lie, and prepared first where they are not there. Imports no torch, and
what prepares a dataset only where there is something to prepare."""

from __future__ import annotations

from data.addresses import is_remote
from data.config import DataConfig
from data.manifest import Manifest
from data.naming import is_prepared, prepared_directory
from data.packing import ensure_packing
from data.place import remove_leftovers
from data.store import Store, open_store, read_manifest


def open_streams(config: DataConfig, *, tell_changes: bool = False) -> dict[str, Store]:
    """Where the dataset of every stream of a recipe lies, by the stream's name: prepared and packed where that is to be
    done here, and at an address there or not. ValueError where what lies there was prepared otherwise than the recipe says.
    Nowhere where the source is read as it comes.

    With `tell_changes`, for a run that begins, sources are held to what they were when a dataset was prepared from them before.
    """
    if config.streaming:
        return {}
    configs = _with_one_tokenizer(config.by_stream())
    stores = {name: _open_stream(stream, tell_changes) for name, stream in configs.items()}
    for name, stream in configs.items():
        ensure_packing(stores[name], stream, tell=_say)
    return stores


def _with_one_tokenizer(configs: dict[str, DataConfig]) -> dict[str, DataConfig]:
    """A `bpe:SIZE` of streams that are prepared here is trained on all of them together: mixed streams share one."""
    local = {name: stream for name, stream in configs.items() if not is_remote(stream.directory)}
    if len(configs) == 1 or not local or not next(iter(local.values())).tokenizer.startswith("bpe:"):
        return configs
    from data.vocabulary import prepare_tokenizer

    tokenizer = str(prepare_tokenizer(list(local.values()), tell=_say))
    return configs | {name: stream.model_copy(update={"tokenizer": tokenizer}) for name, stream in local.items()}


def _open_stream(config: DataConfig, tell_changes: bool) -> Store:
    if is_remote(config.directory):
        store = open_store(config.directory, config)
        _refuse_other_preparation(read_manifest(store), config)
        return store
    directory = prepared_directory(config)
    if not is_prepared(directory, config):
        from launch.preparing import prepare_and_tell  # takes Arrow and Pillow along

        prepare_and_tell(config)
    elif tell_changes and config.directory is not None:  # without a name of its own it is named by the sources' state
        from launch.preparing import tell_changed_sources

        tell_changed_sources(directory, config)
    remove_leftovers(directory)
    return open_store(directory, config)


def _refuse_other_preparation(manifest: Manifest, config: DataConfig) -> None:
    """Whatever the recipe says of the preparation of a dataset that it only reads must be true of it."""
    found: dict[str, object] = {
        "source": [source.address for source in manifest.sources],
        "tokenizer": manifest.tokenizer.spec if manifest.tokenizer else None,
        "validation_fraction": manifest.validation_fraction,
        "shard_bytes": manifest.shard_bytes,
    }
    for key, value in found.items():
        asked = getattr(config, key)
        if asked == DataConfig.model_fields[key].default:
            continue
        if (asked if key != "source" else [source.given for source in config.sources]) != value:
            raise ValueError(
                f"{config.directory}: prepared with data.{key} {value!r}, but the recipe has {asked!r}; "
                "change or remove that, or choose another data.directory"
            )


def _say(line: str) -> None:
    print(line, flush=True)
