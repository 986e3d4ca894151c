"""Documents kept apart on a GPU: attention in blocks computes what attention under the mask computes."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from distrib.blocks import prepare_blocks
from distrib.world import World
from models.build import InputShape
from models.documents import attend_in_blocks, document_blocks, document_mask
from models.transformer import Transformer
from tests.models.model_helpers import TINY_GPT, make

TOKENS = 700
SHAPE = InputShape(vocabulary_size=50, sequence_tokens=TOKENS, separate_documents=True)
SETTINGS = TINY_GPT | {"width": 128, "heads": 4}
# What products of bf16 may differ by, summed in another order.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def documents_on(world: World, samples: int = 3) -> Tensor:
    """Documents of 1 to 400 tokens."""
    choose = torch.Generator().manual_seed(4)
    begins = torch.rand(samples, TOKENS, generator=choose) < torch.tensor([0.2, 0.02, 0.005])[:samples, None]
    return begins.cumsum(dim=1).short().to(world.device)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("heads", "head_width"), [(4, 32), (2, 64), (1, 48), (4, 16)])
def test_attention_in_blocks(gpu: World, heads: int, head_width: int, dtype: torch.dtype) -> None:
    """Forward and gradient, with grouped queries, at lengths that are no multiple of a block."""
    documents = documents_on(gpu)
    choose = torch.Generator(gpu.device).manual_seed(1)

    def random(heads: int) -> Tensor:
        size = (len(documents), heads, TOKENS, head_width)
        return torch.randn(size, generator=choose, device=gpu.device, dtype=dtype).requires_grad_()

    inputs = (random(4), random(heads), random(heads))
    grouped = heads != 4
    found = attend_in_blocks(*inputs, document_blocks(documents), grouped=grouped)
    expected = nn.functional.scaled_dot_product_attention(
        *(tensor.double() for tensor in inputs), attn_mask=document_mask(documents), enable_gqa=grouped
    )
    upstream = torch.randn(found.shape, generator=choose, device=gpu.device, dtype=dtype)
    gradients = [torch.autograd.grad(out, inputs, upstream.to(out.dtype)) for out in (found, expected)]
    for ours, reference in zip((found, *gradients[0]), (expected, *gradients[1]), strict=True):
        scale = reference.abs().max()
        assert (ours.double() - reference).abs().max() / scale < TOLERANCE[dtype]


@pytest.mark.parametrize(("checkpointing", "compiled"), itertools.product(["none", "selective", "full"], [False, True]))
def test_a_model_trains_in_blocks_as_under_the_mask(
    gpu: World, checkpointing: str, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents = documents_on(gpu)
    tokens = torch.arange(documents.numel(), device=gpu.device).view_as(documents) * 7 % 50
    gradients = []
    for in_blocks in (False, True):
        if not in_blocks:
            monkeypatch.setattr(Transformer, "_mask", lambda _, numbers: document_mask(numbers))
        model = make(SETTINGS, SHAPE).to(gpu.device).train()
        if in_blocks:
            prepare_blocks(model, activation_checkpointing=checkpointing, compile_blocks=compiled)
        model(tokens, documents=documents).square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
        monkeypatch.undo()
    for plain, blocked in zip(*gradients, strict=True):
        assert plain is not None
        assert (blocked - plain).abs().max() / plain.abs().max() < 1e-4


def test_the_host_does_not_wait_for_the_documents(gpu: World) -> None:
    model = make(SETTINGS, SHAPE).to(gpu.device).train()
    documents = documents_on(gpu)
    tokens = torch.zeros(documents.shape, dtype=torch.int64, device=gpu.device)
    model(tokens, documents=documents).sum().backward()  # compiles
    other = documents.roll(3, dims=1).contiguous()
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(tokens, documents=other).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_documents_are_as_if_alone(gpu: World) -> None:
    model = make(SETTINGS, SHAPE).to(gpu.device).eval()
    documents = documents_on(gpu)
    tokens = torch.arange(documents.numel(), device=gpu.device).view_as(documents) * 7 % 50
    with torch.no_grad():
        logits = model(tokens, documents=documents)
        ends = (torch.diff(documents[1]).nonzero().flatten() + 1).tolist()
        for start, stop in itertools.pairwise([0, *ends, TOKENS]):
            alone = model(tokens[1:2, start:stop])[0]
            torch.testing.assert_close(logits[1, start:stop], alone, rtol=1e-4, atol=1e-5)
