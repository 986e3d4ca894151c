"""Text from a language model, without disturbing the run it belongs to."""

import torch
from torch import Tensor, nn


@torch.no_grad()
def generate(
    model: nn.Module,
    tokens: list[int],
    *,
    new_tokens: int,
    context_tokens: int,
    temperature: float,
    top_k: int | None,
    seed: int,
    stop_token: int | None,
) -> list[int]:
    """The prompt `tokens` followed by up to `new_tokens` sampled ones.

    Each token is drawn from softmax(logits / temperature) over the `top_k` likeliest (None: all), given the last
    `context_tokens` tokens; temperature 0 takes the likeliest. `stop_token` ends the text and is not part of it. Draws
    come from a CPU generator of its own, so that the global random state stays as it was and devices agree; every
    module's train or eval mode is restored. ValueError for an empty prompt or an impossible setting.
    """
    _check(tokens, new_tokens, context_tokens, temperature, top_k)
    generator = torch.Generator(device="cpu").manual_seed(seed)
    device = next(model.parameters()).device
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        text = list(tokens)
        for _ in range(new_tokens):
            window = torch.tensor([text[-context_tokens:]], dtype=torch.int64, device=device)  # (1, T)
            token = _draw(model(window)[0, -1], temperature, top_k, generator)
            if token == stop_token:
                break
            text.append(token)
        return text
    finally:
        for module, training in modes.items():
            module.training = training


def _draw(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator) -> int:
    """One token id from logits (V,)."""
    logits = logits.to("cpu", torch.float32)
    if temperature == 0:
        return int(logits.argmax())
    if top_k is not None and top_k < logits.numel():
        kept = logits.topk(top_k).indices
        logits = torch.full_like(logits, -torch.inf).index_copy(0, kept, logits[kept])
    probabilities = torch.softmax(logits / temperature, dim=0)
    return int(torch.multinomial(probabilities, 1, generator=generator))


def _check(tokens: list[int], new_tokens: int, context_tokens: int, temperature: float, top_k: int | None) -> None:
    if not tokens:
        raise ValueError("the prompt has no tokens; start with some text or with the end-of-document token")
    if new_tokens < 0:
        raise ValueError(f"new_tokens {new_tokens} is negative; ask for 0 or more")
    if context_tokens < 1:
        raise ValueError(f"context_tokens {context_tokens} must be at least 1; use the model's context")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature {temperature} must be finite and not negative; 0 takes the likeliest token")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k {top_k} must be at least 1; leave it out to sample from all tokens")
