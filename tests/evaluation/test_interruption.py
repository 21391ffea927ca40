"""A stopped evaluation leaves complete rows and no process, and can be resumed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from fibopolicy.evaluation.config import EvaluateConfig
from fibopolicy.evaluation.episodes import read_rows
from fibopolicy.evaluation.evaluate import evaluate_run


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
def test_an_interrupted_evaluation_is_resumed(tiny_run: Path, tmp_path: Path) -> None:
    # Some runners ignore it, which processes would inherit.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    command = [sys.executable, "-m", "fibopolicy", "evaluate", str(run)]
    options = ["--episodes", "50", "--max-steps", "60", "--video", "0", "--workers", "2"]
    rows = run / "episodes.jsonl"
    for i, number in enumerate((signal.SIGINT, signal.SIGTERM)):
        process = subprocess.Popen(
            [*command, *options, *["--resume"][: i > 0]],
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
        _, errors = process.communicate(timeout=600)
        assert process.returncode == 130
        assert "--resume" in errors
        assert errors.count("\n") == 1, errors
        deadline = time.monotonic() + 300
        while any(map(alive, simulators)):
            assert time.monotonic() < deadline, "a process was left behind"
            time.sleep(0.05)
        assert all(json.loads(line) for line in rows.read_text().splitlines())
    kept = {row.index: row for row in read_rows(rows)}
    assert 4 <= len(kept) < 50
    # one more episode completes the rows, and saves the time of the others
    config = EvaluateConfig(run, episodes=max(kept) + 2, max_steps=60, video=0, workers=1)
    evaluate_run(config, resume=True)
    resumed = read_rows(rows)
    assert [row.index for row in resumed] == list(range(max(kept) + 2))
    assert all(resumed[index] == row for index, row in kept.items()), "an episode ran again"
    again = evaluate_run(replace(config, episodes=3), overwrite=True).rows
    assert [row.repeatable() for row in again] == [row.repeatable() for row in resumed[:3]]
