"""Trained models of finished or interrupted runs, to evaluate and to generate with."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException

from data.config import DataConfig
from data.packing import ensure_packing
from data.plan import Plan
from data.store import Store, open_store
from data.stream import MicroBatch
from distrib.checkpoint import Checkpoint, load_tensors, open_checkpoint, read_newest_good
from distrib.initialisation import make_initialised_model
from distrib.manifest import BadCheckpoint, corrupt_checkpoints
from distrib.model_state import model_tensors
from distrib.world import World, single_process_world
from launch.attempt import format_metrics
from launch.config import RunConfig
from launch.evaluation import Sums, evaluate_streams
from launch.materials import Materials, open_materials
from launch.places import present_places
from launch.recipe import recipe_of_run
from launch.run_directory import read_identity
from models.generation import generate


@dataclass(frozen=True)
class TrainedModel:
    """A model with the weights of a verified checkpoint, and what it was trained with."""

    config: RunConfig
    materials: Materials
    module: nn.Module
    checkpoint: Checkpoint
    world: World


def load_trained(run_directory: Path, checkpoint: Path | None, datasets: Sequence[str], device: str) -> TrainedModel:
    """The model of a run: its newest good checkpoint, or the one that is named, with the dataset that it was trained on,
    where the run left it or where `datasets`, each DIR or STREAM=DIR, say. Raises ValueError in one line."""
    config = recipe_of_run(run_directory)
    world = single_process_world(device)
    if config.data.streaming and datasets:
        raise ValueError(
            f"--dataset {datasets[0]}: {run_directory} reads {config.data.source_text} as it comes; remove it"
        )
    stores = {} if config.data.streaming else _dataset_stores(run_directory, datasets, config.data)
    for store in stores.values():
        ensure_packing(store, config.data)
    materials = open_materials(config, stores)
    module = make_initialised_model(materials.make_model, config.run.seed, world.device)
    found = _load_checkpoint(run_directory, checkpoint, module, world)
    for stream in Plan.from_json(json.dumps(found.scalars["plan"])).segments[-1].streams:
        dataset = materials.sources.get(stream.name)
        if dataset is not None and dataset.fingerprint != stream.fingerprint:
            raise ValueError(
                f"{dataset.address}: not the dataset that {found.path} was trained on (it is "
                f"{dataset.fingerprint[:12]}, that was {stream.fingerprint[:12]}); name that one with --dataset"
            )
    return TrainedModel(config, materials, module.eval(), found, world)


def evaluate_run(run_directory: Path, checkpoint: Path | None, datasets: Sequence[str], device: str) -> str:
    """Metrics over the whole validation split, as a line."""
    trained = load_trained(run_directory, checkpoint, datasets, device)
    task = trained.materials.task

    def sum_up(batches: Iterator[MicroBatch]) -> Sums:
        sums: Sums = {}
        with torch.no_grad():
            for batch in batches:
                tensors = {name: tensor.to(trained.world.device) for name, tensor in batch.tensors.items()}
                for name, value in task.evaluate(trained.module, tensors).items():
                    sums[name] = sums[name] + value if name in sums else value
        return sums

    metrics = evaluate_streams(
        trained.materials.validation,
        task,
        sum_up,
        world=trained.world,
        micro_samples=trained.config.batch.micro_samples,
        samples=None,
    )
    return f"{trained.checkpoint.path}: {format_metrics(metrics)}"


def generate_from_run(
    run_directory: Path,
    checkpoint: Path | None,
    datasets: Sequence[str],
    device: str,
    *,
    prompt: str | None,
    new_tokens: int,
    temperature: float | None,
    top_k: int | None,
    seed: int,
) -> str:
    """The prompt and its continuation by the run's language model."""
    trained = load_trained(run_directory, checkpoint, datasets, device)
    tokenizer, context_tokens = trained.materials.tokenizer, trained.materials.shape.sequence_tokens
    if tokenizer is None or context_tokens is None:
        raise ValueError(f"{run_directory}: its model is no language model; use `lockstep evaluate`")
    tokens = generate(
        trained.module,
        [int(token) for token in tokenizer.encode(trained.config.evaluation.prompt if prompt is None else prompt)],
        new_tokens=new_tokens,
        context_tokens=context_tokens,
        temperature=trained.config.evaluation.temperature if temperature is None else temperature,
        top_k=top_k,
        seed=seed,
        stop_token=tokenizer.end_of_document,
    )
    return tokenizer.decode(tokens)


def _dataset_stores(run_directory: Path, given: Sequence[str], config: DataConfig) -> dict[str, Store]:
    """Where the datasets of a run lie. They are never prepared anew: their sources may have changed since."""
    begun = (run_directory / "run.json").is_file()
    recorded = read_identity(run_directory)["attempts"][-1]["datasets"] if begun else {}
    known = {name: entry["directory"] for name, entry in recorded.items()}
    places = present_places(run_directory, known, given)
    return {name: open_store(place, config) for name, place in places.items()}


def _load_checkpoint(run_directory: Path, checkpoint: Path | None, module: nn.Module, world: World) -> Checkpoint:
    """Reads the weights; looks for a newer checkpoint where a live run retires the one that is being read."""
    while True:
        found = open_checkpoint(checkpoint, world) if checkpoint else _find_newest(run_directory, world)
        try:
            load_tensors(found, model_tensors(module), world)
        except (OSError, CheckpointException, ValueError):  # files missing, or, as they are listed, none there any more
            if checkpoint or found.path.exists():
                raise
        else:
            return found


def _find_newest(run_directory: Path, world: World) -> Checkpoint:
    found, passed_over = read_newest_good(run_directory / "checkpoints", world)
    if found is None and not passed_over and not corrupt_checkpoints(run_directory / "checkpoints"):
        raise ValueError(f"{run_directory}: no checkpoint was saved yet; train it further")
    if found is None:
        reasons = "; ".join(bad.reason for bad in passed_over) or "all failed verification before"
        raise BadCheckpoint(f"{run_directory}: no good checkpoint ({reasons}); restore one, or train anew")
    for bad in passed_over:
        print(f"passed over a checkpoint: {bad.reason}", file=sys.stderr)
    return found
