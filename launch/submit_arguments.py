"""The commands `lockstep submit` and `lockstep jobs`, as they are written on a command line. Imports no torch."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_submission_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    submit = commands.add_parser(
        "submit",
        allow_abbrev=False,
        help="train a recipe as a job of a SLURM cluster",
        description="Fills in slurm/train.sbatch (or sweep.sbatch), checks the job, and submits it with a copy of code and "
        "recipe of its own. Lines of the site (modules, container, partition) that stand in the templates stay.",
    )
    submit.add_argument("recipe", help="name of a shipped recipe, or path of a .yaml")
    submit.add_argument("overrides", nargs="*", metavar="section.key=value", help="replace keys of the recipe")
    submit.add_argument("--nodes", default="1", metavar="N|MIN-MAX", help="nodes; of a range what there is (default 1)")
    submit.add_argument(
        "--gpus-per-node", required=True, metavar="[TYPE:]N", help="a worker for each GPU; 0: CPUs alone"
    )
    submit.add_argument("--workers-per-node", type=int, metavar="N", help="where there are no GPUs (default 1)")
    submit.add_argument("--cpus-per-node", type=int, metavar="N", help="cores, for all its workers (default: one each)")
    submit.add_argument("--time", required=True, metavar="TIME", help="limit of one start, such as 12:00:00 or 2-0")
    submit.add_argument(
        "--warn-seconds",
        type=int,
        metavar="N",
        help="before the time limit the run is asked to save and stop (default 300, or a fifth of a short limit)",
    )
    submit.add_argument("--partition", metavar="NAME")
    submit.add_argument("--account", metavar="NAME")
    submit.add_argument("--qos", metavar="NAME")
    submit.add_argument(
        "--sbatch", action="append", default=[], metavar="OPTION", help="any other of sbatch, as --sbatch=--exclude=n3"
    )
    submit.add_argument("--after", metavar="JOB", help="only once that job has ended well")
    submit.add_argument(
        "--sweep",
        action="append",
        default=[],
        metavar="section.key=A,B,...",
        help="a run for each value; repeated: for each combination",
    )
    submit.add_argument("--at-once", type=int, metavar="N", help="of a sweep, at most so many runs at a time")
    submit.add_argument(
        "--launcher",
        choices=["srun", "torchrun"],
        help="a task for each worker, or torchrun on each node (default: the template's, srun)",
    )
    submit.add_argument(
        "--again", choices=["requeue", "chain"], help="how a stopped run comes back (default: the template's, requeue)"
    )
    submit.add_argument(
        "--failures",
        type=int,
        metavar="N",
        help="failures in a row, without a new checkpoint, before the job gives up (default: the template's, 5)",
    )
    submit.add_argument("--dry-run", action="store_true", help="print the script and the sbatch line; submit nothing")
    submit.set_defaults(run=_submit)

    jobs = commands.add_parser(
        "jobs", allow_abbrev=False, help="how the submitted runs are doing", description="The runs submitted from here."
    )
    jobs.add_argument("run_directories", type=Path, nargs="*", metavar="RUN", help="only these")
    jobs.set_defaults(run=_jobs)


def _submit(arguments: argparse.Namespace) -> int:
    from launch.submit import submit

    return submit(arguments)


def _jobs(arguments: argparse.Namespace) -> int:
    from launch.jobs import show_jobs

    return show_jobs(arguments.run_directories)
