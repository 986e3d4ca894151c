"""Models as a user might bring them, written into a folder of their own."""

from __future__ import annotations

from pathlib import Path

SOURCE = '''
"""A user's own models: they know nothing of Lockstep but the shape they are built for."""

import ctypes
import os
import signal
import time
from pathlib import Path

import torch
from torch import nn


class Plain(nn.Module):
    """A bigram model: nothing but nn.Module."""

    def __init__(self, vocabulary_size, width):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary_size, width)
        self.output = nn.Linear(width, vocabulary_size)

    def forward(self, tokens):
        return self.output(self.embedding(tokens))


class WithMethods(Plain):
    """The same, with what makes its initial values independent of everything but seed, name and shape."""

    def blocks(self):
        return [self.output]

    def initialise_parameter(self, name, parameter, generator):
        parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))

    def initialise_buffers(self):
        pass


class Hungry(Plain):
    """Asks for more memory than any machine has."""

    def forward(self, tokens):
        if not tokens.is_meta:
            torch.empty(2**50)
        return super().forward(tokens)


class HungryForMany(Plain):
    """Asks for as much where it is given more than two samples."""

    def forward(self, tokens):
        if not tokens.is_meta and len(tokens) > 2:
            torch.empty(2**50)
        return super().forward(tokens)


class Slow(Plain):
    """Takes a minute for every training step, after the dry run's two forward passes, and says when its worker is asked to
    stop meanwhile."""

    forwards = 0

    def forward(self, tokens):
        self.forwards += self.training and not tokens.is_meta
        if self.training and self.forwards > 2:
            rank = os.environ["RANK"]
            Path(f"slow-{rank}").touch()
            stop = signal.getsignal(signal.SIGTERM).__self__
            for _ in range(600):
                time.sleep(0.1)
                if stop.asked():
                    Path(f"asked-{rank}").touch()
        return super().forward(tokens)


class Late(Plain):
    """On rank 1 each micro-batch of training takes 50 milliseconds more."""

    def forward(self, tokens):
        if self.training and not tokens.is_meta and os.environ.get("RANK") == "1":
            time.sleep(0.05)
        return super().forward(tokens)


class Broken(Plain):
    """Has a mistake."""

    def forward(self, tokens):
        return super().forward(tokens).no_such_thing


class EndsDuringSave(WithMethods):
    """Ends as BREAK says in the step after the tenth, while the checkpoint of that is being written, which waits for this."""

    def __init__(self, vocabulary_size, width):
        super().__init__(vocabulary_size, width)
        self.register_buffer("large", torch.zeros(1 << 24))
        self.how = os.environ.get("BREAK")
        self.ends = os.environ.get("RANK", "0") == os.environ.get("BREAK_RANK", "0")
        if self.how:
            from distrib import phases

            phases.observe(self.hold_save)

    def hold_save(self, moment):
        while moment[:2] == ("save.manifest", 10) and not Path("ends").exists():
            time.sleep(0.01)

    def forward(self, tokens):
        from distrib import phases

        if self.how and self.ends and self.training and phases.now()[:2] == ("forward", 10):
            while not any(Path("run/checkpoints").glob(".tmp-step-00000010-*")):
                time.sleep(0.01)
            Path("ends").touch()
            if self.how == "mistake":
                raise ArithmeticError("a mistake during the save")
            for _ in range(2):
                os.kill(os.getpid(), {"interrupt": signal.SIGINT, "kill": signal.SIGKILL}[self.how])
        return super().forward(tokens)


class WithUnused(Plain):
    """Has a parameter that no loss depends on."""

    def __init__(self, vocabulary_size, width):
        super().__init__(vocabulary_size, width)
        self.unused = nn.Linear(width, width)


class WithBatchNorm(Plain):
    """Keeps running statistics."""

    def __init__(self, vocabulary_size, width):
        super().__init__(vocabulary_size, width)
        self.norm = nn.BatchNorm1d(width)

    def forward(self, tokens):
        return self.output(self.norm(self.embedding(tokens).transpose(1, 2)).transpose(1, 2))


class Poisoned(Plain):
    """From its sixth training forward on, all it returns is not a number."""

    forwards = 0

    def forward(self, tokens):
        self.forwards += self.training and not tokens.is_meta
        logits = super().forward(tokens)
        return logits * float("nan") if self.training and self.forwards > 5 else logits


class Stops(Plain):
    """Has a breakpoint in its training forward."""

    def forward(self, tokens):
        if self.training and not tokens.is_meta:
            breakpoint()
        return super().forward(tokens)


class Overflows(Plain):
    """Divides by zero from its fifth training forward on, which is in the third step of two micro-batches: the dry run has
    one too."""

    forwards = 0

    def __init__(self, vocabulary_size, width):
        super().__init__(vocabulary_size, width)
        self.middle = nn.Sequential(nn.Linear(width, width), Divide(self))

    def forward(self, tokens):
        self.forwards += self.training and not tokens.is_meta
        return self.output(self.middle(self.embedding(tokens)))


class Divide(nn.Module):
    def __init__(self, whole):
        super().__init__()
        self.late = lambda: whole.forwards > 5

    def forward(self, x):
        return x / (0 if self.late() else 1)


class RootOfZero(Plain):
    """Everything it gives out is finite, and its gradient is not."""

    def forward(self, tokens):
        x = self.embedding(tokens)
        return self.output(x + (x - x.detach()).sqrt())


class AltersItsData(Plain):
    """At its second training forward, changes every other letter of the shard that SHARD names, which nobody checks again."""

    forwards = 0

    def forward(self, tokens):
        self.forwards += self.training and not tokens.is_meta
        if self.forwards == 2:
            path = Path(os.environ["SHARD"])
            content = bytearray(path.read_bytes())
            for at in range(0, len(content), 2):
                content[at] ^= content[at + 1] == 0  # a letter stays a letter: a token is two bytes, the lower one first
            with path.open("r+b") as file:
                file.write(content)
        return super().forward(tokens)


class Faulty(WithMethods):
    """On rank FAULT_RANK, at the training forwards that FAULTS lists: by attempt, each counted within it. One that hangs writes
    to `asked` of what signals it hears."""

    forwards = 0

    def forward(self, tokens):
        self.forwards += self.training and not tokens.is_meta
        faults = [int(number) for number in os.environ["FAULTS"].split()]
        tried = Path("tried")
        before = len(tried.read_text()) if tried.exists() else 0
        if os.environ["RANK"] == os.environ["FAULT_RANK"] and before < len(faults) and self.forwards == faults[before]:
            tried.write_text("x" * (before + 1))
            match os.environ["FAULT"]:
                case "mistake":
                    raise ArithmeticError("a mistake of mine")
                case "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                case "exit":
                    os._exit(3)
                case "hang":
                    signal.set_wakeup_fd(os.open("asked", os.O_WRONLY | os.O_CREAT | os.O_NONBLOCK))
                    Path("hangs").touch()
                    mutex, library = ctypes.create_string_buffer(64), ctypes.PyDLL(None)
                    while True:  # the second time for ever: no signal ends that, and it keeps the lock of the interpreter
                        library.pthread_mutex_lock(mutex)
        return super().forward(tokens)


class Troubled(WithMethods):
    """Has the trouble that TROUBLE names (KIND:STEP) in that step; on rank 1 alone where one rank has it."""

    def forward(self, tokens):
        from distrib import phases

        kind, _, step = os.environ.get("TROUBLE", "").partition(":")
        now, alone = phases.now(), os.environ.get("RANK", "0") == "1"
        training = self.training and now.phase == "forward"
        here = training and now.step + 1 == int(step or 0)
        if kind == "slow" and training and alone and now.step + 1 >= int(step or 0):
            time.sleep(0.2)
        if kind == "flip" and here and alone and not getattr(self, "flipped", False):
            self.flipped = True
            with torch.no_grad():
                self.output.weight.view(torch.int32)[3, 5] ^= 1
        logits = super().forward(tokens)
        if kind == "slow-backward" and training and alone and logits.requires_grad:
            logits.register_hook(lambda gradient: time.sleep(0.2))
        if kind == "infinite" and here:
            with torch.no_grad():
                self.output.bias[2] = float("inf")
        return logits * 1000 if kind == "spike" and here else logits


def build(shape, width=16):
    return Plain(shape.vocabulary_size, width)


def build_with_methods(shape, width=16):
    return WithMethods(shape.vocabulary_size, width)


def build_ends_during_save(shape, width=16):
    return EndsDuringSave(shape.vocabulary_size, width)


def build_troubled(shape, width=16):
    return Troubled(shape.vocabulary_size, width)


def build_with_unused(shape, width=16):
    return WithUnused(shape.vocabulary_size, width)


def build_with_batch_norm(shape, width=16):
    return WithBatchNorm(shape.vocabulary_size, width)


def build_hungry(shape):
    return Hungry(shape.vocabulary_size, 16)


def build_hungry_for_many(shape):
    return HungryForMany(shape.vocabulary_size, 16)


def build_slow(shape):
    return Slow(shape.vocabulary_size, 16)


def build_late(shape):
    return Late(shape.vocabulary_size, 16)


def build_poisoned(shape):
    return Poisoned(shape.vocabulary_size, 16)


def build_alters_its_data(shape):
    return AltersItsData(shape.vocabulary_size, 16)


def build_faulty(shape):
    return Faulty(shape.vocabulary_size, 16)


def build_broken(shape):
    return Broken(shape.vocabulary_size, 16)


def build_stops(shape):
    return Stops(shape.vocabulary_size, 16)


def build_overflows(shape):
    return Overflows(shape.vocabulary_size, 16)


def build_root_of_zero(shape):
    return RootOfZero(shape.vocabulary_size, 16)
'''


def write_user_package(folder: Path) -> Path:
    """The package `own_package` with the module `models_of_mine`, to be put on PYTHONPATH."""
    package = folder / "own_package"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "models_of_mine.py").write_text(SOURCE)
    return folder
