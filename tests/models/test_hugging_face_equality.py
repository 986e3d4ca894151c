"""Our models compute what GPT-2, Llama and ResNet compute: same weights, same logits as `transformers`."""

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    ResNetConfig,
    ResNetForImageClassification,
)

from models.build import InputShape, build_model
from models.config import parse_model


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(5)


def randomise(model: nn.Module) -> dict[str, Tensor]:
    """Values far from the initial ones, so that every weight, norm and bias counts."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.state_dict()


def load_exactly(model: nn.Module, state: dict[str, Tensor]) -> None:
    assert set(state) == set(model.state_dict())
    model.load_state_dict(state)


def largest_difference(ours: nn.Module, theirs: nn.Module, inputs: Tensor) -> float:
    with torch.no_grad():
        expected = theirs(inputs).logits
        assert expected.std() > 0.1  # a comparison of zeros would prove nothing
        return (ours(inputs) - expected).abs().max().item()


def gpt2_state(theirs: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
    """GPT-2 keeps its matrices as (in, out) and query, key and value as one."""
    state = {
        "token_embedding.weight": theirs["transformer.wte.weight"],
        "position_embedding.weight": theirs["transformer.wpe.weight"],
    }
    for kind in ("weight", "bias"):
        state[f"final_norm.{kind}"] = theirs[f"transformer.ln_f.{kind}"]
    for layer in range(layers):
        source, target = f"transformer.h.{layer}", f"layers.{layer}"
        for kind in ("weight", "bias"):
            state[f"{target}.attention_norm.{kind}"] = theirs[f"{source}.ln_1.{kind}"]
            state[f"{target}.feed_forward_norm.{kind}"] = theirs[f"{source}.ln_2.{kind}"]
            thirds = theirs[f"{source}.attn.c_attn.{kind}"].chunk(3, dim=-1)
            for name, third in zip(("query", "key", "value"), thirds, strict=True):
                state[f"{target}.attention.{name}.{kind}"] = third.t() if kind == "weight" else third
            for ours, name in (
                ("attention.output", "attn.c_proj"),
                ("feed_forward.up", "mlp.c_fc"),
                ("feed_forward.down", "mlp.c_proj"),
            ):
                value = theirs[f"{source}.{name}.{kind}"]
                state[f"{target}.{ours}.{kind}"] = value.t() if kind == "weight" else value
    return state


def llama_state(theirs: dict[str, Tensor], layers: int, *, tied: bool) -> dict[str, Tensor]:
    state = {
        "token_embedding.weight": theirs["model.embed_tokens.weight"],
        "final_norm.weight": theirs["model.norm.weight"],
    }
    if not tied:
        state["output.weight"] = theirs["lm_head.weight"]
    names = {
        "attention_norm": "input_layernorm",
        "feed_forward_norm": "post_attention_layernorm",
        "attention.query": "self_attn.q_proj",
        "attention.key": "self_attn.k_proj",
        "attention.value": "self_attn.v_proj",
        "attention.output": "self_attn.o_proj",
        "feed_forward.gate": "mlp.gate_proj",
        "feed_forward.up": "mlp.up_proj",
        "feed_forward.down": "mlp.down_proj",
    }
    for layer in range(layers):
        for ours, name in names.items():
            state[f"layers.{layer}.{ours}.weight"] = theirs[f"model.layers.{layer}.{name}.weight"]
    return state


def test_gpt2():
    theirs = GPT2LMHeadModel(GPT2Config(vocab_size=101, n_positions=48, n_embd=36, n_layer=3, n_head=3)).eval()
    config = parse_model(
        {"kind": "transformer", "layers": 3, "width": 36, "heads": 3, "positions": "learned", "norm": "layernorm"}
        | {"activation": "gelu_tanh", "bias": True, "dropout": 0.1}
    )
    ours = build_model(config, InputShape(vocabulary_size=101, sequence_tokens=48)).eval()
    load_exactly(ours, gpt2_state(randomise(theirs), layers=3))
    assert largest_difference(ours, theirs, torch.randint(0, 101, (2, 48))) < 1e-5


LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
OUR_SCALING = {
    "factor": 8.0,
    "low_frequency_factor": 1.0,
    "high_frequency_factor": 4.0,
    "original_context_tokens": 16,
}


@pytest.mark.parametrize(
    ("key_value_heads", "head_width", "tied", "scaled"),
    [(4, 8, False, False), (2, 8, False, False), (1, 16, True, False), (2, 8, False, True)],
)
def test_llama(key_value_heads, head_width, tied, scaled):
    theirs = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=101,
            hidden_size=32,
            intermediate_size=88,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=key_value_heads,
            head_dim=head_width,
            max_position_embeddings=64,
            rms_norm_eps=1e-5,
            tie_word_embeddings=tied,
            rope_parameters={"rope_theta": 5000.0, **(LLAMA3_SCALING if scaled else {"rope_type": "default"})},
        )
    ).eval()
    config = parse_model(
        {"kind": "transformer", "layers": 3, "width": 32, "heads": 4, "key_value_heads": key_value_heads}
        | {"head_width": head_width, "feed_forward_width": 88, "rope_base": 5000.0, "tied_embeddings": tied}
        | ({"rope_scaling": OUR_SCALING} if scaled else {})
    )
    ours = build_model(config, InputShape(vocabulary_size=101, sequence_tokens=64)).eval()
    load_exactly(ours, llama_state(randomise(theirs), layers=3, tied=tied))
    tokens = torch.randint(0, 101, (2, 64))
    assert largest_difference(ours, theirs, tokens) < 1e-5

    # Negative control: with another base of the angles the comparison must fail.
    other = config.model_copy(update={"rope_base": 10_000.0})
    other_model = build_model(other, InputShape(vocabulary_size=101, sequence_tokens=64)).eval()
    other_model.load_state_dict(ours.state_dict())
    assert largest_difference(other_model, theirs, tokens) > 1e-3


def resnet_state(theirs: dict[str, Tensor], ours: nn.Module, convolutions: int) -> dict[str, Tensor]:
    """Our names to theirs: a branch is convolution, norm and relu, repeated, and the last norm stands apart."""
    state = {}
    for name in ours.state_dict():
        *_, leaf = name.split(".")
        if name.startswith("stem"):
            part = "convolution" if name.startswith("stem.0") else "normalization"
            source = f"resnet.embedder.embedder.{part}"
        elif name.startswith("classifier"):
            source = "classifier.1"
        else:
            _, stage, block, part, *index = name.split(".")
            layer = f"resnet.encoder.stages.{stage}.layers.{block}"
            if part == "branch":
                place, kind = divmod(int(index[0]), 3)
                source = f"{layer}.layer.{place}.{'convolution' if kind == 0 else 'normalization'}"
            elif part == "last_norm":
                source = f"{layer}.layer.{convolutions - 1}.normalization"
            else:
                source = f"{layer}.shortcut.{'convolution' if index[0] == '0' else 'normalization'}"
        state[name] = theirs[f"{source}.{leaf}"]
    return state


@pytest.mark.parametrize(("layers", "depths", "bottleneck"), [(18, [2, 2, 2, 2], False), (50, [3, 4, 6, 3], True)])
def test_resnet(layers, depths, bottleneck):
    widths = [64, 128, 256, 512]
    theirs = ResNetForImageClassification(
        ResNetConfig(
            hidden_sizes=[width * 4 for width in widths] if bottleneck else widths,
            depths=depths,
            layer_type="bottleneck" if bottleneck else "basic",
            num_labels=7,
        )
    )
    ours = build_model(
        parse_model({"kind": "resnet", "layers": layers}), InputShape(channels=3, image_size_pixels=64, classes=7)
    )
    load_exactly(ours, resnet_state(theirs.state_dict(), ours, convolutions=3 if bottleneck else 2))
    # In training mode: batch statistics keep the activations of an untrained network in range.
    assert largest_difference(ours.train(), theirs.train(), torch.randn(4, 3, 64, 64)) < 1e-5
