"""How every engine sets up PyTorch's DistributedDataParallel (DDP)."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

# Buffers are not broadcast: a step must not depend on rank 0's running statistics.
DDP_OPTIONS: dict[str, Any] = {"gradient_as_bucket_view": True, "broadcast_buffers": False}


@contextlib.contextmanager
def quiet_ddp() -> Iterator[None]:
    """Wrapping a model, without warnings that a user can do nothing about."""
    # A convolution with one input channel has two equal descriptions of its strides; DDP warns, later, that they differ.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    with warnings.catch_warnings():
        # Newer versions rename `broadcast_buffers`; the oldest supported one knows no other name.
        warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")
        yield
