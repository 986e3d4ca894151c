"""What the system is for: models learn."""

from __future__ import annotations

import math
from pathlib import Path

from launch.tracking.metrics_file import read_metrics
from tests.end_to_end.runs import WORDS


def test_a_tiny_gpt_learns_a_text_down_to_its_entropy(learned_gpt: Path) -> None:
    """The text is words drawn evenly, each with a space: ln(words) nats a word, spread over its bytes."""
    entropy = math.log(len(WORDS)) / (sum(len(word) + 1 for word in WORDS) / len(WORDS))
    steps, evaluations = read_metrics(learned_gpt)
    before, after = evaluations[0]["evaluation"], evaluations[-1]["evaluation"]
    assert [record["step"] for record in evaluations] == [0, 150]
    assert abs(before["loss"] - math.log(257)) < 0.1
    assert 0.97 * entropy < after["loss"] < 1.1 * entropy
    assert math.isclose(after["bits_per_byte"], after["loss"] / math.log(2), rel_tol=0.02)
    assert not any(record["skipped"] for record in steps)


def test_lenet_reaches_97_percent_on_held_out_digits(learned_lenet: Path) -> None:
    _, evaluations = read_metrics(learned_lenet)
    before, after = evaluations[0]["evaluation"], evaluations[-1]["evaluation"]
    assert before["accuracy"] < 0.3
    assert after["samples"] > 300
    assert after["accuracy"] >= 0.97
    assert after["precision"] >= 0.96
    assert after["recall"] >= 0.96
