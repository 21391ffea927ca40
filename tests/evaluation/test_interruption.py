"""A stopped evaluation leaves whole rows, no process, and goes on where it was."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from fibopolicy.evaluation.episodes import read_rows
from fibopolicy.training import TrainConfig
from fibopolicy.training.trainer import train


def children(pid: int) -> list[int]:
    """The processes that a process started, and theirs."""
    tasks = Path(f"/proc/{pid}/task")
    found = [
        int(child) for task in tasks.iterdir() for child in (task / "children").read_text().split()
    ]
    return found + [grandchild for child in found for grandchild in children(child)]


def alive(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


@pytest.mark.slow
@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="looks for processes in /proc")
def test_an_interrupted_evaluation_goes_on_where_it_was(
    tiny_config: TrainConfig, tmp_path: Path
) -> None:
    # some runners ignore it, which processes would inherit
    signal.signal(signal.SIGINT, signal.default_int_handler)
    run = tmp_path / "run"
    train(replace(tiny_config, out=run))
    arguments = [
        sys.executable,
        "-m",
        "fibopolicy",
        "evaluate",
        str(run),
        "--episodes",
        "24",
        "--video",
        "0",
    ]
    rows = run / "episodes.jsonl"
    for i, number in enumerate((signal.SIGINT, signal.SIGTERM)):
        process = subprocess.Popen(
            [*arguments, "--workers", "2", *["--resume"][: i > 0]],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        before = len(read_rows(rows))
        while len(read_rows(rows)) < before + 2:
            assert process.poll() is None
            time.sleep(0.02)
        simulators = children(process.pid)
        assert len(simulators) >= 2
        process.send_signal(number)
        _, told = process.communicate(timeout=30)
        assert process.returncode == 130
        assert "--resume" in told
        assert told.count("\n") == 1, told
        deadline = time.monotonic() + 10
        while any(map(alive, simulators)):
            assert time.monotonic() < deadline, "a process was left behind"
            time.sleep(0.05)
        assert all(json.loads(line) for line in rows.read_text().splitlines())
    kept = {row.index: row for row in read_rows(rows)}
    assert 4 <= len(kept) < 24
    subprocess.run(
        [*arguments, "--workers", "1", "--resume"], check=True, stdout=subprocess.DEVNULL
    )
    resumed = read_rows(rows)
    assert [row.index for row in resumed] == list(range(24))
    assert all(resumed[index] == row for index, row in kept.items()), "an episode ran again"
    subprocess.run(
        [*arguments, "--workers", "3", "--overwrite"], check=True, stdout=subprocess.DEVNULL
    )
    assert [row.repeatable() for row in read_rows(rows)] == [row.repeatable() for row in resumed]
