"""The commands that make datasets and look into them: `lockstep prepare` and `lockstep data`. Imports no torch."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from data.config import SOURCE_FORMS
from launch.stop_signals import answering_stop_signals


def add_prepare_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    prepare = commands.add_parser(
        "prepare",
        allow_abbrev=False,
        help="turn sources into a dataset of shards",
        description="Turns sources into a dataset of shards. Killed at any moment, the same command goes on from there.",
    )
    prepare.add_argument("source", nargs="+", metavar="[SPLIT=]SOURCE", help=SOURCE_FORMS)
    prepare.add_argument("--out", type=Path, required=True, metavar="DIR", help="the dataset's directory")
    prepare.add_argument("--workers", type=int, metavar="N", help="worker processes (default: one for each core)")
    prepare.add_argument("--tokenizer", default="bytes", metavar="bytes|bpe:SIZE|FILE|NAME")
    prepare.add_argument(
        "--validation-fraction",
        type=float,
        default=0.05,
        metavar="F",
        help="share of documents held out (default 0.05)",
    )
    prepare.add_argument(
        "--part", metavar="I/N", help="only the share I, from 1 to N, of a job array; then `lockstep data merge DIR`"
    )
    _add_pack_tokens(prepare)
    prepare.set_defaults(run=_prepare)


def add_data_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    data = commands.add_parser(
        "data", allow_abbrev=False, help="what is in a prepared dataset, and whether a run read it as planned"
    )
    actions = data.add_subparsers(required=True, metavar="ACTION")
    merge = actions.add_parser(
        "merge",
        allow_abbrev=False,
        help="put together what `lockstep prepare --part I/N` has made, every byte verified",
    )
    merge.add_argument("directory", type=Path, metavar="DIR", help="the dataset's directory, as it was given by --out")
    merge.add_argument("--workers", type=int, metavar="N", help="worker processes (default: one for each core)")
    _add_pack_tokens(merge)
    merge.set_defaults(run=_merge)
    info = actions.add_parser("info", allow_abbrev=False, help="what a dataset is made of, and some of it decoded")
    info.add_argument("address", metavar="DATASET", help="its directory, or an address such as s3://BUCKET/PLACE")
    info.add_argument("--split", metavar="NAME", help="only this split (default: all)")
    info.add_argument("--examples", type=int, default=3, metavar="N", help="so many of each split (default 3)")
    info.set_defaults(run=_data_info)
    verify = actions.add_parser(
        "verify", allow_abbrev=False, help="read every byte; exit code 78 where one is not as it was prepared"
    )
    verify.add_argument("address", metavar="DATASET", help="its directory, or an address such as s3://BUCKET/PLACE")
    _add_workers(verify)
    _add_pack_tokens(
        verify, "the packing index for sequences of T tokens must be there: for addresses that cannot be listed"
    )
    verify.set_defaults(run=_verify_data)
    order = actions.add_parser("order", allow_abbrev=False, help="what a step reads, computed without running anything")
    order.add_argument("target", metavar="RECIPE|RUN", help="a run's directory, or a recipe whose data is prepared")
    order.add_argument("overrides", nargs="*", metavar="section.key=value", help="replace keys of the recipe")
    order.add_argument("--step", type=int, required=True, metavar="K", help="the first is 1")
    order.add_argument("--world", type=int, metavar="N", help="as N workers read it: by rank and micro-batch")
    order.add_argument("--micro-samples", type=int, metavar="M", help="default: the recipe's batch.micro_samples")
    add_datasets(order)
    order.add_argument("--decode", action="store_true", help="show what each sample holds")
    order.set_defaults(run=_order)
    audit = actions.add_parser(
        "audit",
        allow_abbrev=False,
        help="prove from plan, shards and log that a run read each sample as often as planned; 78 where it is not proven",
    )
    audit.add_argument("run_directory", type=Path, metavar="RUN")
    _add_workers(audit)
    add_datasets(audit)
    audit.set_defaults(run=_audit)


def add_datasets(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dataset",
        action="append",
        default=[],
        metavar="[STREAM=]DIR",
        help="where the run's dataset lies now, if it was moved; of a mixture, once for each stream that was",
    )


def _add_pack_tokens(
    parser: argparse.ArgumentParser,
    what: str = "also pack documents into sequences of T tokens, for data.packing=best_fit",
) -> None:
    parser.add_argument(
        "--pack-tokens",
        type=_sequence_tokens,
        action="append",
        default=[],
        metavar="T",
        help=f"{what}; may be repeated",
    )


def _sequence_tokens(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text}: must be a whole number of at least 1")
    return int(text)


def _add_workers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workers", type=int, metavar="N", help="worker processes (default: one for each core)")


def _prepare(arguments: argparse.Namespace) -> int:
    from data.config import DataConfig
    from launch.recipe import parse_section

    section = {
        "source": arguments.source[0] if len(arguments.source) == 1 else arguments.source,
        "directory": str(arguments.out),
        "tokenizer": arguments.tokenizer,
        "validation_fraction": arguments.validation_fraction,
    }
    config = parse_section(DataConfig, section, prefix="data.", source="lockstep prepare")
    workers = _count_workers(arguments.workers)
    from data.prepare import Part
    from launch.preparing import prepare_or_tell

    part = None if arguments.part is None else Part.parse(arguments.part)
    if part is not None and arguments.pack_tokens:
        raise ValueError(
            "--pack-tokens needs the whole dataset; give it to `lockstep data merge` instead of to a --part"
        )
    from launch.preparing import pack_and_tell

    with answering_stop_signals(as_interrupts=True):
        directory = prepare_or_tell(config, workers=workers, part=part)
        pack_and_tell(directory, arguments.pack_tokens)
    print(directory)
    return 0


def _merge(arguments: argparse.Namespace) -> int:
    workers = _count_workers(arguments.workers)
    from launch.preparing import merge_and_tell, pack_and_tell

    with answering_stop_signals(as_interrupts=True):
        directory = merge_and_tell(arguments.directory, workers=workers)
        pack_and_tell(directory, arguments.pack_tokens)
    print(directory)
    return 0


def _count_workers(asked: int | None) -> int:
    """How many processes prepare data; the tokenizers' library, which has threads where it trains, is held to as many."""
    if asked is not None and asked < 1:
        raise ValueError(f"--workers {asked}: must be at least 1")
    workers = asked if asked is not None else len(os.sched_getaffinity(0))
    os.environ["RAYON_NUM_THREADS"] = str(workers)
    return workers


def _data_info(arguments: argparse.Namespace) -> int:
    if arguments.examples < 0:
        raise ValueError(f"--examples {arguments.examples}: must be at least 0")
    from launch.data_commands import show_info

    return show_info(arguments.address, arguments.split, arguments.examples)


def _verify_data(arguments: argparse.Namespace) -> int:
    workers = _workers_of(arguments)
    from launch.data_commands import verify_dataset

    return verify_dataset(arguments.address, workers, arguments.pack_tokens)


def _order(arguments: argparse.Namespace) -> int:
    from launch.data_order import show_order

    return show_order(
        arguments.target,
        arguments.overrides,
        arguments.dataset,
        step=arguments.step,
        world=arguments.world,
        micro_samples=arguments.micro_samples,
        decode=arguments.decode,
    )


def _audit(arguments: argparse.Namespace) -> int:
    workers = _workers_of(arguments)
    from launch.auditing import audit_run

    return audit_run(arguments.run_directory, arguments.dataset, workers)


def _workers_of(arguments: argparse.Namespace) -> int:
    """How many processes do the work: one for each core where nothing was said."""
    asked: int | None = arguments.workers
    if asked is not None and asked < 1:
        raise ValueError(f"--workers {asked}: must be at least 1")
    return asked if asked is not None else len(os.sched_getaffinity(0))
