"""The verb that compares policies."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import tyro

from fibopolicy.evaluation.compare import Choice


@dataclass(frozen=True)
class Compare:
    """Compare evaluated runs on the same start states: paired differences with intervals, exact tests, a verdict.

    The first run or group is the baseline, every other one a candidate. Groups pool the training seeds of one method.

    Example: fibopolicy compare runs/dense runs/fibottention --margin 0.05
    Example: fibopolicy compare --group dense='runs/dense_seed*' --group fibottention='runs/fib_seed*'
    """

    runs: tyro.conf.Positional[tuple[Path, ...]] = ()
    """Run directories."""
    group: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """NAME=RUNS: several training seeds of one method, as paths or patterns joined by commas; may be given several times."""
    margin: float | None = None
    """How much worse a candidate may be and still count as not inferior, e.g. 0.05; fix it before you see the rows."""
    difference: tuple[float, ...] = (0.02, 0.05, 0.1)
    """Differences of rates whose needed episodes are printed."""
    choice: tyro.conf.OmitArgPrefixes[Choice] = field(default_factory=Choice)

    def run(self) -> None:
        from fibopolicy.evaluation.compare import compare, sides
        from fibopolicy.evaluation.comparison_text import text

        comparison = compare(sides(self.runs, self.group, self.choice), self.margin)
        print(text(comparison, self.difference))
