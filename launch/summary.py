"""What a person reads at the end of a run: before and after, a sample of what it learned, and what to do next."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
from pathlib import Path

from launch.attempt import Attempt, format_metrics
from models.generation import generate


def tell_summary(attempt: Attempt) -> None:
    """Prints the summary of a run that did all its steps. Rank 0 speaks; all ranks generate the sample, because the
    model's weights may be spread over them."""
    with_sample = attempt.config.evaluation.generated_tokens and attempt.materials.tokenizer is not None
    sample = _sample_text(attempt) if with_sample else None
    if attempt.world.rank != 0:
        return
    path = attempt.run.path
    lines = [""]
    if attempt.first_evaluation is not None and attempt.first_evaluation is not attempt.last_evaluation:
        lines.append(f"evaluation before: {format_metrics(attempt.first_evaluation)}")
    if attempt.last_evaluation is not None:
        lines.append(f"evaluation after:  {format_metrics(attempt.last_evaluation)}")
    if sample is not None:
        _keep_sample(attempt, sample)
        lines += ["", "a sample of its text:", attempt.config.evaluation.prompt + sample]
    if attempt.checkpoint_stalls:
        saves, seconds = len(attempt.checkpoint_stalls), sum(attempt.checkpoint_stalls)
        lines += ["", f"training waited {seconds:.3g} s for {saves} checkpoint{'s' if saves > 1 else ''}"]
    if not attempt.kept:
        attempt.say("\n".join(lines))
        return
    lines += [
        "",
        f"everything lies in {path}: {', '.join(sorted(p.name + '/' * p.is_dir() for p in path.iterdir()))}",
        "next:",
        *(f"  {shlex.join([_command(), *map(str, words)])}" for words in _next_commands(attempt)),
    ]
    attempt.say("\n".join(lines))


def _next_commands(attempt: Attempt) -> list[list[object]]:
    path, longer = attempt.run.path, f"run.steps={2 * attempt.config.run.steps}"
    return [
        ["report", path],
        ["generate" if attempt.materials.tokenizer is not None else "evaluate", path],
        ["train", path / "recipe.yaml", longer, "--resume", path, "--allow-change"],
    ]


def _command() -> str:
    """How the `lockstep` command is called from here: by its path where the environment is not activated."""
    beside_python = Path(sys.executable).parent / "lockstep"
    if shutil.which("lockstep") == str(beside_python):
        return "lockstep"
    return os.path.relpath(beside_python) if beside_python.is_relative_to(Path.cwd()) else str(beside_python)


def _sample_text(attempt: Attempt) -> str:
    evaluation, tokenizer = attempt.config.evaluation, attempt.materials.tokenizer
    context_tokens = attempt.materials.shape.sequence_tokens
    assert tokenizer is not None
    assert context_tokens is not None
    prompt = [int(token) for token in tokenizer.encode(evaluation.prompt)]
    tokens = generate(
        attempt.engine.module,
        prompt,
        new_tokens=evaluation.generated_tokens,
        context_tokens=context_tokens,
        temperature=evaluation.temperature,
        top_k=None,
        seed=attempt.config.run.seed,
        stop_token=tokenizer.end_of_document,
    )
    return tokenizer.decode(tokens[len(prompt) :])


def _keep_sample(attempt: Attempt, text: str) -> None:
    record = {"step": attempt.ledger.step, "prompt": attempt.config.evaluation.prompt, "text": text}
    with (attempt.run.path / "samples.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(record, ensure_ascii=False) + "\n")
