import io
import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from launch.console import Progress


def record(step: int, **changes: Any) -> dict[str, Any]:
    return {
        "step": step,
        "loss": 2.5,
        "step_seconds": 0.5,
        "data_wait_seconds": 0.05,
        "items_per_second": 12_000.0,
        "mfu": None,
        "skipped": False,
    } | changes


def lines(interval_seconds: float, *records: dict[str, Any], total_steps: int = 100, item: str = "token") -> list[str]:
    stream = io.StringIO()
    progress = Progress("auto", total_steps, records[0]["step"], item, stream, interval_seconds)
    for each in records:
        progress.update(each)
    progress.close()
    return stream.getvalue().splitlines()


def test_the_first_and_the_last_step_get_a_line_whatever_the_interval() -> None:
    out = lines(1e6, *(record(step) for step in range(1, 101)))
    assert [line.split()[1] for line in out] == ["1/100", "100/100"]


def test_a_resumed_run_starts_with_a_line() -> None:
    out = lines(1e6, *(record(step) for step in range(41, 60)))
    assert [line.split()[1] for line in out] == ["41/100"]


def test_every_step_gets_a_line_when_the_interval_is_over() -> None:
    assert len(lines(1e-9, *(record(step) for step in range(1, 11)))) == 10


def test_a_line_says_loss_throughput_and_data_wait() -> None:
    (line,) = lines(1e6, record(1))
    assert line == "step 1/100  loss 2.5000  12k tokens/s  data wait 10.0%"


def test_mfu_only_where_it_is_known_and_items_by_their_name() -> None:
    (line,) = lines(1e6, record(1, mfu=0.4312), item="sample")
    assert "12k samples/s  MFU 43.1%" in line


def test_throughput_and_wait_are_means_over_the_interval_not_of_its_last_step() -> None:
    first, last = record(1), record(2, step_seconds=1.0, items_per_second=1000.0, data_wait_seconds=0.0)
    third = record(3, step_seconds=3.0, items_per_second=2000.0, data_wait_seconds=2.0)
    assert "1.75k tokens/s  data wait 50.0%" in lines(1e6, first, last, third, total_steps=3)[1]


def test_a_skipped_step_between_two_lines_is_told_with_the_next_one() -> None:
    out = lines(1e6, record(1), record(2, skipped=True, loss=None), record(3), total_steps=3)
    assert "1 skipped" in out[1]


@pytest.mark.parametrize(("loss", "text"), [(None, "none"), (float("nan"), "nan"), (1e-5, "1.000e-05"), (3, "3")])
def test_unusual_losses(loss: Any, text: str) -> None:
    assert f"loss {text}" in lines(1e6, record(1, loss=loss))[0]


def test_messages_are_lines_in_every_mode() -> None:
    for mode in ("lines", "off"):
        stream = io.StringIO()
        progress = Progress(mode, 10, 1, "token", stream)  # type: ignore[arg-type]
        progress.message("saved checkpoints/step-00000005 [1 of 2]")
        progress.close()
        assert stream.getvalue() == "saved checkpoints/step-00000005 [1 of 2]\n"


def test_off_shows_no_steps() -> None:
    stream = io.StringIO()
    progress = Progress("off", 3, 1, "token", stream, 1e-9)
    for step in (1, 2, 3):
        progress.update(record(step))
    assert stream.getvalue() == ""


BAR = """
import sys
from launch.console import Progress
progress = Progress("auto", 3, 1, "token", sys.stderr)
for step in (1, 2, 3):
    progress.update({"step": step, "loss": 2.5, "step_seconds": 0.5, "data_wait_seconds": 0.0,
                     "items_per_second": 1200.0, "mfu": 0.4, "skipped": False})
    if step == 2:
        progress.message("saved [bold]step 2[/bold]")
progress.close()
"""


def test_a_terminal_gets_a_bar_with_messages_above_it(tmp_path: Path) -> None:
    terminal, its_end = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "150"}
    process = subprocess.Popen([sys.executable, "-c", BAR], stderr=its_end, env=environment)
    os.close(its_end)
    shown = b""
    try:
        while block := os.read(terminal, 4096):
            shown += block
    except OSError:  # how Linux says that the other end of a terminal was closed
        pass
    os.close(terminal)
    assert process.wait() == 0
    text = shown.decode()
    assert "\r" in text
    assert "saved [bold]step 2[/bold]\r\n" in text
    assert "loss 2.5000" in text
    assert "MFU 40.0%" in text
    assert "3/3" in text.rsplit("saved", 1)[1]
