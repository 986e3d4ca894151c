"""Initial values are a function of (seed, parameter name, shape), whatever else happened before."""

from __future__ import annotations

import torch
from torch import nn

from distrib.initialisation import make_initialised_model
from distrib.keys import key64
from distrib.world import World
from models.build import build_model
from models.config import ResNetConfig, TransformerConfig
from tests.distrib.engine_runs import MODEL, SHAPE
from tests.worker_pool import WorkerPool

CPU = torch.device("cpu")
GOLDEN_KEY = 6365159002178424754


def _weights(model: TransformerConfig, seed: int) -> dict[str, torch.Tensor]:
    return dict(make_initialised_model(lambda: build_model(model, SHAPE), seed, CPU).state_dict())


def test_the_random_state_and_other_parameters_do_not_matter() -> None:
    torch.manual_seed(1)
    first = _weights(MODEL, 5)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    deeper = _weights(MODEL.model_copy(update={"layers": 3, "norm": "layernorm"}), 5)
    assert torch.equal(torch.get_rng_state(), state)
    # Residual projections are scaled by depth; every other matrix must hold the same numbers.
    residual = (".attention.output.weight", ".feed_forward.down.weight")
    matrices = [name for name in first if first[name].ndim == 2 and not name.endswith(residual)]
    assert len(matrices) > 2 * MODEL.layers
    assert all(torch.equal(first[name], deeper[name]) for name in matrices)


def test_seed_and_name_matter() -> None:
    first, second = _weights(MODEL, 5), _weights(MODEL, 6)
    matrices = [name for name in first if first[name].ndim == 2]
    assert all(not torch.equal(first[name], second[name]) for name in matrices)
    # Same seed and shape, another name.
    assert not torch.equal(first["layers.0.attention.query.weight"], first["layers.0.attention.key.weight"])


def _hash(world: World) -> float:
    return sum(tensor.double().sum().item() for tensor in _weights(MODEL, 5).values())


def test_the_world_size_does_not_matter(gloo_pool: WorkerPool) -> None:
    assert len({*gloo_pool.run(_hash, 1), *gloo_pool.run(_hash, 3)}) == 1


class Plain(nn.Module):
    """A user's module without any of our methods, whose constructor reads a tensor's values."""

    def __init__(self) -> None:
        super().__init__()
        self.rates = [rate.item() for rate in torch.linspace(0, 1, 3)]
        self.layers = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        self.scale = nn.Parameter(torch.randn(4))


def test_a_plain_module_is_initialised_by_its_submodules_alone() -> None:
    torch.manual_seed(1)
    first = make_initialised_model(Plain, 7, CPU).state_dict()
    torch.rand(3)
    state = torch.get_rng_state()
    second = make_initialised_model(Plain, 7, CPU).state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["layers.0.weight"], first["layers.1.weight"])
    other = make_initialised_model(Plain, 8, CPU).state_dict()
    assert all(not torch.equal(first[name], other[name]) for name in first)


def test_batch_statistics_start_clean_after_the_meta_device() -> None:
    from models.build import InputShape

    shape = InputShape(channels=1, image_size_pixels=8, classes=10)
    model = make_initialised_model(lambda: build_model(ResNetConfig(layers=20), shape), 0, CPU)
    buffers = dict(model.named_buffers())
    means = [tensor for name, tensor in buffers.items() if name.endswith("running_mean")]
    assert means
    assert all(torch.equal(tensor, torch.zeros_like(tensor)) for tensor in means)


def test_keys_are_hashes_of_all_their_parts() -> None:
    keys = [
        key64("a", 1),
        key64("a", 2),
        key64("b", 1),
        key64("a1"),
        key64("a", 1, 0),
        key64("a", "1"),
        key64("a", [1]),
    ]
    assert len(set(keys)) == len(keys)
    # Golden: another value would silently change every run's dropout and initial weights.
    assert key64("forward", 0, 0, 0) == GOLDEN_KEY
