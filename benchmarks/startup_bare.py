"""The bare script that startup is compared with: torch and NumPy imported, a GPT of the given sizes built, one step.

    python benchmarks/startup_bare.py LAYERS WIDTH HEADS VOCABULARY SAMPLES TOKENS

With RANK and the like in its environment it is one process of several, on gloo.
"""

import os
import sys
import time

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel


def main() -> None:
    layers, width, heads, vocabulary, samples, tokens = map(int, sys.argv[1:])
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1:
        torch.distributed.init_process_group("gloo")
    block = nn.TransformerEncoderLayer(width, heads, 4 * width, norm_first=True, batch_first=True)
    module: nn.Module = nn.Sequential(
        nn.Embedding(vocabulary, width),
        nn.TransformerEncoder(block, layers, enable_nested_tensor=False),
        nn.Linear(width, vocabulary),
    )
    model = module if world == 1 else DistributedDataParallel(module)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    print("built", time.process_time(), flush=True)  # for startup.py
    batch = torch.from_numpy(np.random.default_rng(0).integers(0, vocabulary, (samples // world, tokens + 1)))
    loss = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
    loss.backward()
    optimizer.step()
    if world > 1:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
