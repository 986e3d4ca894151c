"""Documents side by side in one sequence: each is computed as if it were alone, and nothing passes between them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from distrib.blocks import prepare_blocks
from models.build import InputShape, build_model
from models.config import TaskConfig, parse_model
from models.documents import attend_in_blocks, document_blocks, document_mask, document_positions
from models.tasks import build_task
from tests.models.model_helpers import TINY_GPT, make
from tests.models.test_hugging_face_equality import gpt2_state, llama_state, load_exactly, randomise

TASK = build_task(TaskConfig(kind="language_modelling"), token_bytes=torch.arange(50))
SHAPE = InputShape(vocabulary_size=50, sequence_tokens=24, separate_documents=True)
# The last sample is one document, the third begins and ends with a single token.
LENGTHS = ((5, 9, 10), (12, 1, 11), (1, 22, 1), (24,))
MODELS = {
    "rope": TINY_GPT,
    "learned positions": TINY_GPT | {"positions": "learned", "norm": "layernorm", "activation": "gelu", "bias": True},
    "grouped queries": TINY_GPT | {"key_value_heads": 2, "tied_embeddings": False},
}


def numbers(lengths: tuple[tuple[int, ...], ...] = LENGTHS) -> Tensor:
    """(B, T) int16, as the data's are."""
    return torch.stack([torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in lengths]).short()


def spans() -> list[tuple[int, int, int]]:
    """(sample, start, stop) of every document."""
    found = []
    for sample, row in enumerate(LENGTHS):
        start = 0
        for length in row:
            found.append((sample, start, start + length))
            start += length
    return found


def packed_batch() -> dict[str, Tensor]:
    """As data/ makes it: the first token of a document is no target; here no document ends with the last target."""
    tokens = torch.randint(0, 50, (len(LENGTHS), 25), generator=torch.Generator().manual_seed(2))
    documents = numbers()
    mask = torch.ones(documents.shape, dtype=torch.bool)
    mask[:, :-1] = documents[:, 1:] == documents[:, :-1]
    return {"tokens": tokens.to(torch.uint16), "documents": documents, "loss_mask": mask}


def test_positions_and_masks() -> None:
    documents = numbers()
    positions, mask = document_positions(documents), document_mask(documents)
    assert mask.shape == (4, 1, 24, 24)
    for sample, start, stop in spans():
        assert positions[sample, start:stop].tolist() == list(range(stop - start))
        expected = torch.zeros(stop - start, 24, dtype=torch.bool)
        expected[:, start:stop] = torch.ones(stop - start, stop - start).tril().bool()
        assert torch.equal(mask[sample, 0, start:stop], expected)
    assert torch.equal(document_positions(7 - documents), positions)  # only who is whose neighbour counts


@pytest.mark.parametrize("name", MODELS)
def test_a_document_is_computed_as_if_alone(name: str) -> None:
    model = make(MODELS[name], SHAPE).double()
    batch = packed_batch()
    logits = model(batch["tokens"].long()[:, :-1], documents=batch["documents"])
    together = TASK.loss(model, batch)
    per_sample, items, sums = torch.zeros(len(LENGTHS)), 0, {"loss_sum": 0.0, "tokens": 0, "bytes": 0}
    for sample, start, stop in spans():
        alone = model(batch["tokens"].long()[sample : sample + 1, start:stop])
        torch.testing.assert_close(logits[sample, start:stop], alone[0], rtol=0, atol=1e-13)
        own = {"tokens": batch["tokens"][sample : sample + 1, start : stop + (stop == 24)]}
        if own["tokens"].shape[1] > 1:
            loss = TASK.loss(model, own)
            per_sample[sample] += loss.per_sample[0]
            items += int(loss.items)
            for key, value in TASK.evaluate(model, own).items():
                sums[key] += value.item()
    torch.testing.assert_close(together.per_sample, per_sample, rtol=1e-6, atol=1e-6)
    assert int(together.items) == TASK.items(batch) == items
    evaluated = TASK.evaluate(model, batch)
    assert {key: value.item() for key, value in evaluated.items()} == pytest.approx(sums, rel=1e-7)

    # Negative control: without the documents' numbers the comparison must fail.
    mixed = model(batch["tokens"].long()[:, :-1])
    assert (mixed[0, 5:14] - logits[0, 5:14]).abs().max() > 1e-3


@pytest.mark.parametrize("name", MODELS)
def test_nothing_passes_between_documents(name: str) -> None:
    """Bit for bit: not in the forward pass, and not in the backward pass."""
    model = make(MODELS[name], SHAPE)
    batch = packed_batch()
    changed = batch["tokens"].long()
    changed[0, 5:14] = (changed[0, 5:14] + 7) % 50
    before, after = (model(t[:, :-1], documents=batch["documents"]) for t in (batch["tokens"].long(), changed))
    same = (before == after).all(dim=-1)
    assert not same[0, 5:14].any()
    same[0, 5:14] = True
    assert same.all()

    embedded: list[Tensor] = []
    model.token_embedding.register_forward_hook(lambda _module, _inputs, output: embedded.append(output))
    logits = model(batch["tokens"].long()[:, :-1], documents=batch["documents"])
    (gradient,) = torch.autograd.grad(logits[0, 5:14].square().sum(), embedded)
    reached = gradient.abs().sum(dim=-1) > 0
    assert reached[0, 5:14].all()
    reached[0, 5:14] = False
    assert not reached.any()


@pytest.mark.parametrize(
    ("checkpointing", "compiled"),
    [("full", False), ("selective", False), pytest.param("none", True, marks=pytest.mark.long)],
)
def test_blocks_that_are_recomputed_or_compiled_compute_the_same(checkpointing: str, compiled: bool) -> None:
    batch = packed_batch()
    settings = TINY_GPT | {"dropout": 0.0 if compiled else 0.1}  # compiled, other numbers are drawn
    gradients = []
    for treated in (False, True):
        model = make(settings, SHAPE).train()
        if treated:
            prepare_blocks(model, activation_checkpointing=checkpointing, compile_blocks=compiled)
        torch.manual_seed(3)
        TASK.loss(model, batch).total.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    tolerance = 1e-5 if compiled else 0.0
    for plain, treated_one in zip(*gradients, strict=True):
        torch.testing.assert_close(treated_one, plain, rtol=tolerance, atol=tolerance)


def hugging_face_pairs() -> dict[str, tuple[nn.Module, nn.Module]]:
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=24, n_embd=36, n_layer=2, n_head=3)).eval()
    our_gpt2 = build_model(
        parse_model(
            {"kind": "transformer", "layers": 2, "width": 36, "heads": 3, "positions": "learned", "norm": "layernorm"}
            | {"activation": "gelu_tanh", "bias": True}
        ),
        SHAPE,
    ).eval()
    load_exactly(our_gpt2, gpt2_state(randomise(gpt2), layers=2))
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=50,
            hidden_size=32,
            intermediate_size=88,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            max_position_embeddings=24,
            rms_norm_eps=1e-5,
            tie_word_embeddings=False,
            rope_parameters={"rope_theta": 5000.0, "rope_type": "default"},
        )
    ).eval()
    our_llama = build_model(
        parse_model(
            {"kind": "transformer", "layers": 2, "width": 32, "heads": 4, "key_value_heads": 2, "head_width": 8}
            | {"feed_forward_width": 88, "rope_base": 5000.0, "tied_embeddings": False}
        ),
        SHAPE,
    ).eval()
    load_exactly(our_llama, llama_state(randomise(llama), layers=2, tied=False))
    return {"gpt2": (our_gpt2, gpt2), "llama": (our_llama, llama)}


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@torch.no_grad()
def test_hugging_face_computes_the_same_of_each_document(kind: str) -> None:
    torch.manual_seed(5)
    ours, theirs = hugging_face_pairs()[kind]
    batch = packed_batch()
    tokens = batch["tokens"].long()[:, :-1]
    logits = ours(tokens, documents=batch["documents"])
    for sample, start, stop in spans():
        expected = theirs(tokens[sample : sample + 1, start:stop]).logits[0]
        assert expected.std() > 0.1
        assert (logits[sample, start:stop] - expected).abs().max() < 1e-5


@pytest.mark.long
@torch.no_grad()
def test_attention_in_blocks_is_attention_under_the_mask() -> None:
    """What a GPU runs, forward and on the CPU; tests/gpu holds it on a GPU, and its gradient."""
    documents = numbers(((100, 3, 97, 100), (300,), (1, 128, 127, 44)))
    query = torch.randn(3, 4, 300, 16, generator=torch.Generator().manual_seed(1))
    key, value = torch.randn(2, 3, 2, 300, 16, generator=torch.Generator().manual_seed(2))
    expected = nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=document_mask(documents), enable_gqa=True
    )
    blocks = document_blocks(documents)
    assert blocks.full_kv_num_blocks is not None
    # Of 27 blocks of 128 x 128, 18 lie before or on the diagonal, and in 3 of these no two tokens are of one document.
    assert int(blocks.kv_num_blocks.sum() + blocks.full_kv_num_blocks.sum()) == 15
    found = attend_in_blocks(query, key, value, blocks, grouped=True)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
