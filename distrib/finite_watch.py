"""The first tensor of a run that is not finite, named: by the module that gave it out, or by the parameter whose gradient it is.

For one process that looks into a model (`lockstep train --debug`): every look waits for the device.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import keystr, tree_flatten_with_path

from distrib.engine import LossFunction, LossSum
from distrib.phases import now

# A frame of a Python traceback as text: file, line, and the source where it is known.
_FRAME = re.compile(r'  File "(.+)", line (\d+), in .+\n(?:    (.+)\n)?')
_TORCH = str(Path(torch.__file__).parent)


class NonFinite(Exception):
    """Names the first tensor that is not finite, in one line."""


class FiniteWatch:
    """Ends a run with `NonFinite` where a module's output, a loss or a parameter's gradient is not finite.

    Infinities below zero alone do not end it, since masks are made of them; they are told with what they lead to.
    `tell_gradients`: takes the line about a gradient instead of ending the run, once a step, for fp16, whose loss scale
    is found by gradients that overflow.
    """

    def __init__(self, tell_gradients: Callable[[str], None] | None = None) -> None:
        self._tell_gradients = tell_gradients
        self._told_at = ""
        self._names: dict[torch.Tensor, str] = {}
        self._modules: dict[str, nn.Module] = {}
        self._masked: str | None = None
        """The first output of this forward pass with infinities below zero."""
        self._origin: str | None = None
        """What made the first gradient of this backward pass that is not finite."""

    def watch(self, model: nn.Module) -> None:
        """Looks at what every module of the model gives out, from now on."""
        self._names = {parameter: name for name, parameter in model.named_parameters()}
        self._modules = dict(model.named_modules())
        model.register_forward_pre_hook(self._before_evaluation)
        for name, module in self._modules.items():
            module.register_forward_hook(partial(self._after_forward, name), with_kwargs=True)

    def wrap(self, loss: LossFunction) -> LossFunction:
        """The same loss function, which also looks at the batch, at the loss and, in the backward pass, at gradients."""

        def watched(model: nn.Module, batch: Mapping[str, torch.Tensor]) -> LossSum:
            self._masked = self._origin = None
            for name, tensor in batch.items():
                if _has_non_finite(tensor):
                    raise NonFinite(f"{_where()}: the batch is not finite in its field {name}: {describe(tensor)}")
            result = loss(model, batch)
            if _has_non_finite(result.total):
                cause = self._masked_before() or "; what every module gave out is finite: look at the task"
                raise NonFinite(f"{_where()}: the loss is not finite: {describe(result.total)}{cause}")
            # A dry run's gradients are nothing on purpose: an engine may start from zero or from what is not a number.
            if result.total.requires_grad and now().phase != "start":
                self._watch_backward(result.total)
            return result

        return watched

    def _before_evaluation(self, *_: Any) -> None:
        """An evaluation does not pass through the watched loss."""
        if not torch.is_grad_enabled():
            self._masked = None

    def _after_forward(
        self, name: str, module: nn.Module, inputs: tuple[Any, ...], named_inputs: dict[str, Any], output: Any
    ) -> None:
        if torch.compiler.is_compiling():
            return  # looking would break the graph in two, and what was to be looked into would not be there any more
        for path, tensor in _tensors(output):
            if not _has_non_finite(tensor):
                continue
            cause = self._cause(name, module, (*inputs, named_inputs))
            place = f"output{path} of {_told(name, module)}: {describe(tensor)}; {cause}"
            if bool((tensor == -torch.inf).logical_or(torch.isfinite(tensor)).all()):
                self._masked = self._masked or place
                continue
            raise NonFinite(f"{_where()}: the first tensor that is not finite is {place}{self._masked_before()}")

    def _cause(self, name: str, module: nn.Module, inputs: tuple[Any, ...]) -> str:
        """Whether the module had what is not finite already, in its own values or in its inputs."""
        compiled = any(part._compiled_call_impl is not None for part in self._modules.values())
        hidden = ", or into the compiled blocks before it, which nobody looks at" if compiled else ""
        for key, tensor in (*module.named_parameters(), *module.named_buffers()):
            if _has_non_finite(tensor):
                return f"its own {key} is not finite: {describe(tensor)}"
        if any(_has_non_finite(tensor) for _, tensor in _tensors(inputs)):
            return (
                f"its input was not finite already, and no module gave that out: look into {self._caller(name)}{hidden}"
            )
        return "its inputs and parameters are finite"

    def _caller(self, name: str) -> str:
        """The innermost module around this one that has a forward of its own."""
        while name:
            name = name.rpartition(".")[0]
            if not isinstance(self._modules[name], nn.ModuleList | nn.ModuleDict):
                break
        return f"the forward of {_told(name, self._modules[name])}"

    def _masked_before(self) -> str:
        return f"; infinite before it is {self._masked}" if self._masked else ""

    def _watch_backward(self, total: torch.Tensor) -> None:
        """Looks at every gradient on the way from the loss to the parameters."""
        seen: set[Any] = set()
        waiting: list[Any] = [total.grad_fn]
        while waiting:
            node = waiting.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            waiting += [following for following, _ in node.next_functions]
            if hasattr(node, "variable"):
                node.register_prehook(partial(self._at_parameter, node.variable))
            else:
                # Not the node itself: it would keep its own hook, and so the whole graph, alive.
                node.register_hook(partial(self._after_backward, node.name(), node.metadata.get("traceback_", [])))

    def _after_backward(self, name: str, forward: list[str], made: tuple[Any, ...], given: tuple[Any, ...]) -> None:
        if self._origin is None and any(map(_has_non_finite, made)) and not any(map(_has_non_finite, given)):
            self._origin = f"made by {name}, whose forward is {_own_line(forward)}"

    def _at_parameter(self, parameter: torch.Tensor, gradients: tuple[Any, ...]) -> None:
        bad = next((gradient for gradient in gradients if _has_non_finite(gradient)), None)
        if bad is None:
            return
        where = _where()
        line = (
            f"{where}: the first gradient that is not finite is that of {self._names.get(parameter, 'a parameter')}: "
            f"{describe(bad)}; {self._origin or 'it was not finite from the loss on'}"
        )
        if self._tell_gradients is None:
            # Anomaly detection would print a page about this very hook.
            warnings.filterwarnings("ignore", message="Error detected in")
            raise NonFinite(line)
        if self._told_at != where:
            self._told_at = where
            self._tell_gradients(f"{line}; with fp16 the step is skipped and the loss scale halved")


def describe(tensor: torch.Tensor) -> str:
    """Shape, dtype, and how many values are not finite, of which kind."""
    values = tensor.detach()
    kinds = {
        "nan": int(values.isnan().sum()),
        "inf": int((values == torch.inf).sum()),
        "-inf": int((values == -torch.inf).sum()),
    }
    told = ", ".join(f"{count:,} {kind}" for kind, count in kinds.items() if count)
    dtype = str(tensor.dtype).removeprefix("torch.")
    return f"shape {tuple(tensor.shape)}, {dtype}, {sum(kinds.values()):,} of {tensor.numel():,} values not finite ({told})"


def _has_non_finite(tensor: Any) -> bool:
    if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point() or tensor.layout != torch.strided:
        return False
    return not bool(torch.isfinite(tensor.detach()).all())


def _tensors(tree: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors in what a module takes or gives, and the way to each: `[0]`, `['logits']`."""
    for path, leaf in tree_flatten_with_path(tree)[0]:
        if isinstance(leaf, torch.Tensor):
            yield keystr(path), leaf


def _told(name: str, module: nn.Module) -> str:
    return f"{name} ({type(module).__name__})" if name else f"the model itself ({type(module).__name__})"


def _where() -> str:
    moment = now()
    if moment.phase in ("forward", "backward"):
        return f"step {moment.step + 1}, {moment.phase}"
    if moment.phase == "evaluate":
        return f"evaluation after step {moment.step}"
    return "dry run before the first step" if moment.phase == "start" else f"after step {moment.step}"


def _own_line(forward: list[str]) -> str:
    """The innermost line of a traceback that is not torch's own."""
    frames = [match.groups() for entry in forward for match in _FRAME.finditer(entry)]
    for file, line, source in reversed(frames):
        if not file.startswith((_TORCH, "<")):
            return f"{file}:{line}" + (f" ({source.strip()})" if source else "")
    return "not known"
