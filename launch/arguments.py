"""The arguments of a training run, the same for `lockstep train` and the worker `python -m launch.train`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence


def add_training_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", help="name of a shipped recipe, or path of a .yaml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="replace keys of the recipe")
    parser.add_argument(
        "--resume",
        metavar="auto|PATH",
        help="continue run.directory from its newest good checkpoint (auto), a run's directory, or one checkpoint",
    )
    parser.add_argument(
        "--allow-change", action="store_true", help="let a resumed run differ from its recipe in what may differ"
    )
    # What deepspeed passes to every worker, beside LOCAL_RANK.
    parser.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)


def add_debug_arguments(parser: argparse.ArgumentParser) -> None:
    """Of `lockstep train` alone, which can be the one process of a run itself."""
    parser.add_argument(
        "--debug",
        action="store_true",
        help="five steps in this process, where breakpoints work; shows the first batch and names what is not finite",
    )
    parser.add_argument(
        "--fake-world",
        type=int,
        metavar="N",
        help="with --debug: one rank of N without the others, to see its shapes, memory and collectives",
    )
    parser.add_argument("--fake-rank", type=int, metavar="R", help="with --fake-world: which rank (default 0)")


def training_command_line(arguments: argparse.Namespace) -> list[str]:
    """The arguments as a worker takes them."""
    line = [arguments.recipe, *arguments.overrides]
    if arguments.resume is not None:
        line += ["--resume", arguments.resume]
    if arguments.allow_change:
        line.append("--allow-change")
    return line


def parse_with_overrides(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parses a command line on which overrides may also stand between and after options."""
    arguments, rest = parser.parse_known_args(argv)
    for word in rest:
        if word.startswith("-") or "=" not in word or not hasattr(arguments, "overrides"):
            parser.error(f"unrecognized argument: {word}")
    if rest:
        arguments.overrides = [*arguments.overrides, *rest]
    return arguments
