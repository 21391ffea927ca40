"""How runs are distributed over GPUs, with processes that only say where they would run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fibopolicy.errors import UserError
from fibopolicy.study.executors import Local


class FakeProcess:
    """A run that ends at once."""

    def __init__(self, study: Any, run: Any, folder: Path, variables: dict[str, str]) -> None:
        self.run = (variables.get("CUDA_VISIBLE_DEVICES"), variables["FIBOPOLICY_RUNS_PER_GPU"])

    def has_ended(self) -> bool:
        return True

    def wait(self) -> float:
        return 0.0


@pytest.mark.parametrize(
    ("jobs", "per_gpu", "expected", "sharing"),
    [
        (None, None, "01", "1"),
        (None, 2, "0101", "2"),
        (None, 3, "010101", "3"),
        (3, None, "010", "2"),
    ],
)
def test_runs_are_spread_over_the_gpus(
    monkeypatch: pytest.MonkeyPatch,
    jobs: int | None,
    per_gpu: int | None,
    expected: str,
    sharing: str,
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr("fibopolicy.study.executors.RunProcess", FakeProcess)
    executor = Local(jobs, 1, None, per_gpu)
    assert executor.slots == len(expected)
    waiting: Any = iter(range(executor.slots))
    found = executor.execute(None, lambda: next(waiting, None), Path())  # type: ignore[arg-type]
    assert [variables for variables, _ in found] == [(gpu, sharing) for gpu in expected]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")  # as a cluster's scheduler does
    waiting = iter(range(2))
    found = executor.execute(None, lambda: next(waiting, None), Path())  # type: ignore[arg-type]
    assert [gpu for (gpu, _), _ in found] == ["5", "7"]


def test_runs_per_gpu_need_a_gpu_and_no_other_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match="jobs_per_gpu must be at least 1, got 0"):
        Local(None, 1, None, 0)
    with pytest.raises(UserError, match="give one"):
        Local(2, 1, None, 2)
    with pytest.raises(UserError, match="needs a GPU for the study, and there is none"):
        Local(None, 1, "cpu", 2)
