from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fibopolicy.attention import FibottentionPattern, like
from fibopolicy.attention.plot import plot_crossover, plot_pattern
from fibopolicy.attention.profile import attention_table, profile_attention


def test_a_profile_times_every_contender_in_both_passes_and_writes_it_down(tmp_path: Path) -> None:
    report = profile_attention([(1, 2, 64), (1, 2, 100)], head_dim=16, turns=3)
    named = {(t.shape, t.what, t.passes) for t in report.timings}
    assert len(named) == 2 * 4 * 2
    assert all(t.speedup == pytest.approx(1) for t in report.timings if t.what == "dense SDPA")
    assert all(t.spread[0] <= t.speedup <= t.spread[1] for t in report.timings)
    report.write(tmp_path / "new" / "result.json")
    read = json.loads((tmp_path / "new" / "result.json").read_text())
    assert len(read["timings"]) == 16
    assert read["environment"]["torch"]
    assert len(attention_table(report).splitlines()) == 18
    plot_crossover(report, tmp_path / "crossover.png")
    assert (tmp_path / "crossover.png").stat().st_size > 1000


@pytest.mark.parametrize("baseline", ["unpermuted", "random"])
def test_patterns_can_be_plotted(baseline: str, tmp_path: Path) -> None:
    plot_pattern(like(FibottentionPattern(36, 7), baseline), tmp_path / "pattern.png")
    assert (tmp_path / "pattern.png").stat().st_size > 1000


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak memory from /proc")
def test_memory_is_linear_in_the_number_of_tokens() -> None:
    program = """
import torch
from fibopolicy.attention import FibottentionPattern, fibottention
def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) / 2**20
def step(n):
    pattern = FibottentionPattern(n, 4)
    q, k, v = (torch.randn(1, 4, n + 1, 64, requires_grad=True) for _ in range(3))
    out = fibottention(q, k, v, pattern, backend="numba")
    out.backward(torch.ones_like(out))
    return 8 * q.numel() * 4 / 2**30
step(100)  # compiles
before = peak()
tensors = step(12544)
print(peak() - before - tensors)
"""  # noqa: E501
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    # GiB beyond inputs, result and gradients; the logits of one head alone are 0.6
    assert float(done.stdout) < 0.4
