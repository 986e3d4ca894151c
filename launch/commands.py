"""What the `lockstep` command can do. Imports no torch: help and a bad recipe answer at once."""

from __future__ import annotations

import argparse
import os
import select
import sys
from collections.abc import Sequence
from pathlib import Path

from launch.arguments import (
    add_debug_arguments,
    add_training_arguments,
    parse_with_overrides,
    training_command_line,
)
from launch.data_arguments import add_data_commands, add_datasets, add_prepare_command
from launch.exit_codes import DO_NOT_RESTART, FAILED, USAGE
from launch.stop_signals import answering_stop_signals
from launch.submit_arguments import add_submission_commands


def run_command(argv: Sequence[str] | None) -> int:
    """Runs a command and returns its exit code. Where nobody reads its output any more, as before `head`, it ends quietly;
    KeyboardInterrupt where it was interrupted."""
    try:
        try:
            return _run(argv)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        if not _nobody_reads_output():
            raise
        # What is still buffered would be written in vain once more when the interpreter ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED


def _nobody_reads_output() -> bool:
    """Whether standard output is a pipe whose other end is closed."""
    poll = select.poll()
    poll.register(sys.stdout, 0)
    return any(events & select.POLLERR for _, events in poll.poll(0))


def _run(argv: Sequence[str] | None) -> int:
    # A user's own model lies where they stand, as it does for `python -m launch.train`; last, so that it shadows nothing.
    sys.path.append(str(Path.cwd()))
    arguments = parse_with_overrides(_make_parser(), argv)
    try:
        if arguments.run is _train:
            return _train(arguments)
        with answering_stop_signals():
            return arguments.run(arguments)
    except ValueError as error:
        print(f"lockstep: error: {error}", file=sys.stderr)
        return _exit_code(error)


def _make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lockstep",
        allow_abbrev=False,
        description="Trains transformers and CNNs from one recipe: the same run everywhere.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    train = commands.add_parser(
        "train", allow_abbrev=False, help="train a recipe", description="Trains a recipe on this machine."
    )
    add_training_arguments(train)
    train.add_argument(
        "--workers", type=int, metavar="N", help="worker processes (default: one per GPU; without a GPU two)"
    )
    add_debug_arguments(train)
    train.set_defaults(run=_train)

    add_prepare_command(commands)

    evaluate = commands.add_parser(
        "evaluate", allow_abbrev=False, help="evaluate a run's newest good checkpoint on its validation split"
    )
    evaluate.add_argument("run_directory", type=Path, metavar="RUN")
    evaluate.add_argument("--checkpoint", type=Path, metavar="PATH", help="this checkpoint instead")
    add_datasets(evaluate)
    evaluate.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    evaluate.set_defaults(run=_evaluate)

    generate = commands.add_parser("generate", allow_abbrev=False, help="continue a text with a run's language model")
    generate.add_argument("run_directory", type=Path, metavar="RUN")
    generate.add_argument("--prompt", help="the text to continue (default: the recipe's evaluation.prompt)")
    generate.add_argument("--tokens", type=int, default=200, metavar="N", help="most tokens to write (default 200)")
    generate.add_argument("--temperature", type=float, help="0: always the likeliest token (default: the recipe's)")
    generate.add_argument("--top-k", type=int, metavar="K", help="draw among the K likeliest only")
    generate.add_argument("--seed", type=int, default=0)
    generate.add_argument("--checkpoint", type=Path, metavar="PATH", help="this checkpoint instead")
    add_datasets(generate)
    generate.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    generate.set_defaults(run=_generate)

    add_data_commands(commands)
    _add_checkpoint_commands(commands)
    add_submission_commands(commands)

    report = commands.add_parser(
        "report", allow_abbrev=False, help="one self-contained HTML page about one or more runs"
    )
    report.add_argument("run_directories", type=Path, nargs="+", metavar="RUN")
    report.add_argument("--out", type=Path, metavar="FILE", help="default: report.html in the first run")
    report.set_defaults(run=_report)

    goodput = commands.add_parser(
        "goodput",
        allow_abbrev=False,
        help="where every second of a run went, over all its attempts",
        description="Where every second of a run went, over all its attempts, and how many were spent in steps that counted.",
    )
    goodput.add_argument("run_directory", type=Path, metavar="RUN")
    goodput.set_defaults(run=_goodput)

    engines = commands.add_parser(
        "engines",
        allow_abbrev=False,
        help="what each engine can do, and what of it has been run",
        description="The values of the recipe's section `parallel` that each engine takes, and what of it has been run.",
    )
    engines.set_defaults(run=_engines)

    doctor = commands.add_parser(
        "doctor",
        allow_abbrev=False,
        help="measure this machine, or under a launcher a job's machines; 1 where something is broken",
        description="Versions, speeds of devices, memory, exchange and disk, room, and W&B, in some seconds. Under a launcher: "
        "`... -m launch.cli doctor` in place of `... -m launch.train`.",
    )
    doctor.add_argument("recipe", nargs="?", help="look at the places and trackers that this recipe uses")
    doctor.add_argument("overrides", nargs="*", metavar="section.key=value", help="replace keys of the recipe")
    doctor.add_argument("--workers", type=int, metavar="N", help="processes that measure (default: as for `train`)")
    doctor.add_argument("--device", choices=["auto", "cpu", "cuda"], help="default: the recipe's run.device, or auto")
    doctor.add_argument("--json", action="store_true", help="for programs")
    # What launchers pass to every worker.
    doctor.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)
    doctor.set_defaults(run=_doctor)
    return parser


def _add_checkpoint_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    checkpoint = commands.add_parser(
        "checkpoint", allow_abbrev=False, help="verify, list or export what a run has saved; alters nothing"
    )
    actions = checkpoint.add_subparsers(required=True, metavar="ACTION")
    verify = actions.add_parser(
        "verify", allow_abbrev=False, help="read every byte; exit code 78 where one is not as it was written"
    )
    verify.add_argument("path", type=Path, metavar="PATH", help="a checkpoint, or a run: all its checkpoints")
    verify.set_defaults(run=_verify_checkpoints)
    listing = actions.add_parser("list", allow_abbrev=False, help="the checkpoints of a run, without reading them")
    listing.add_argument("run_directory", type=Path, metavar="RUN")
    listing.set_defaults(run=_list_checkpoints)
    export = actions.add_parser(
        "export", allow_abbrev=False, help="the weights as safetensors files, as Hugging Face's tools read them"
    )
    export.add_argument("path", type=Path, metavar="PATH", help="a checkpoint, or a run: its newest good one")
    export.add_argument("--out", type=Path, required=True, metavar="DIR", help="a directory that is not there yet")
    export.set_defaults(run=_export_checkpoint)


def _train(arguments: argparse.Namespace) -> int:
    """Requests to stop are answered while data is prepared and then by the supervisor; in between they wait."""
    from data.naming import all_is_there
    from distrib.capabilities import count_shards
    from distrib.launchers import refuse_to_start_workers
    from launch.debug_command import debug, refuse_alone
    from launch.recipe import load_recipe
    from launch.run_directory import decide_resume
    from launch.supervisor import default_workers, supervise

    refuse_to_start_workers(one_process=arguments.debug)
    if arguments.debug:
        with answering_stop_signals():
            return debug(arguments)
    refuse_alone(arguments)
    config = load_recipe(arguments.recipe, arguments.overrides)
    resume = decide_resume(config, arguments.resume)
    workers = arguments.workers if arguments.workers is not None else default_workers(config.run.device)
    if workers < 1:
        raise ValueError(f"--workers {workers}: must be at least 1")
    count_shards(config.parallel, workers)
    # Until there are workers to ask, a request to stop is answered as Ctrl-C is: preparing leaves nothing half-done.
    with answering_stop_signals(as_interrupts=True):
        if not all_is_there(config.data):
            from launch.streams import open_streams  # takes NumPy along

            open_streams(config.data, tell_changes=resume.begins_anew)
    return supervise(training_command_line(arguments), workers, config, resume)


def _evaluate(arguments: argparse.Namespace) -> int:
    from launch.trained import evaluate_run

    print(evaluate_run(arguments.run_directory, arguments.checkpoint, arguments.dataset, arguments.device))
    return 0


def _generate(arguments: argparse.Namespace) -> int:
    from launch.trained import generate_from_run

    print(
        generate_from_run(
            arguments.run_directory,
            arguments.checkpoint,
            arguments.dataset,
            arguments.device,
            prompt=arguments.prompt,
            new_tokens=arguments.tokens,
            temperature=arguments.temperature,
            top_k=arguments.top_k,
            seed=arguments.seed,
        )
    )
    return 0


def _verify_checkpoints(arguments: argparse.Namespace) -> int:
    from launch.checkpoints import verify

    return verify(arguments.path)


def _list_checkpoints(arguments: argparse.Namespace) -> int:
    from launch.checkpoints import list_run

    return list_run(arguments.run_directory)


def _export_checkpoint(arguments: argparse.Namespace) -> int:
    from launch.checkpoints import export

    return export(arguments.path, arguments.out)


def _report(arguments: argparse.Namespace) -> int:
    from launch.report import build_report

    print(build_report(arguments.run_directories, arguments.out))
    return 0


def _goodput(arguments: argparse.Namespace) -> int:
    from launch.goodput import show_goodput

    print(show_goodput(arguments.run_directory))
    return 0


def _engines(arguments: argparse.Namespace) -> int:
    from distrib.engine_table import format_table

    print(format_table())
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    from launch.doctor import examine_machine
    from launch.recipe import load_recipe

    config = load_recipe(arguments.recipe, arguments.overrides) if arguments.recipe is not None else None
    device = arguments.device or (config.run.device if config is not None else "auto")
    return examine_machine(config, workers=arguments.workers, device=device, as_json=arguments.json)


def _exit_code(error: ValueError) -> int:
    from data.errors import CorruptData
    from distrib.manifest import BadCheckpoint

    return DO_NOT_RESTART if isinstance(error, CorruptData | BadCheckpoint) else USAGE
