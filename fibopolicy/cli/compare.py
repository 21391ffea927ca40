"""The verb that compares policies."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from fibopolicy.errors import UserError
from fibopolicy.evaluation.compare import Choice
from fibopolicy.utils.files import check_output


@dataclass(frozen=True)
class Compare:
    """Compare evaluated runs on the same start states: paired differences with
    intervals, exact tests, a verdict.

    The first run or group is the baseline, every other one a candidate. Groups pool the
    training seeds of one method.

    Example: fibopolicy compare runs/dense runs/fibottention --margin 0.05 Example:
    fibopolicy compare runs/dense runs/fibottention --out compare.html --video 6
    Example: fibopolicy compare --group dense='runs/dense_seed*' --group
    fibottention='runs/fib_seed*'
    """

    runs: tyro.conf.Positional[tuple[Path, ...]] = ()
    """Run directories."""
    group: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """NAME=RUNS: several training seeds of one method, as paths or patterns joined by commas; may be given several times."""  # noqa: E501
    margin: float | None = None
    """How much worse a candidate may be and still count as not inferior, e.g. 0.05; fix it before you see the rows."""  # noqa: E501
    difference: tuple[float, ...] = (0.02, 0.05, 0.1)
    """Differences of rates whose needed episodes are printed."""
    choice: Annotated[Choice, tyro.conf.arg(name="")] = field(default_factory=Choice)

    out: Path | None = None
    """HTML page to write: tables, intervals, success against time."""
    video: int = 0
    """Start states on which the baseline and the first candidate are filmed side by side, into the page and an mp4 beside it."""  # noqa: E501
    starts: Path | None = None
    """File of start states for the video; those kept in each run directory by default."""
    overwrite: bool = False
    """Replace an existing page and video."""

    def run(self) -> None:
        from fibopolicy.evaluation.compare import compare, sides
        from fibopolicy.evaluation.comparison_text import text
        from fibopolicy.evaluation.episodes import ROWS

        film = self.out.with_suffix(".mp4") if self.out is not None and self.video else None
        if self.video < 0 or (self.video and self.out is None):
            raise UserError(
                f"--video {self.video}: expected a number of start states, and --out PAGE to show"
                " them in"
            )
        for path in (self.out, film):
            if path is not None:
                check_output(path, self.overwrite, [run / ROWS for run in self.runs])
        comparison = compare(sides(self.runs, self.group, self.choice), self.margin)
        print(text(comparison, self.difference), flush=True)
        if film is not None:
            from fibopolicy.evaluation.side_by_side import film_side_by_side

            film_side_by_side(comparison, film, self.video, self.starts)
            print(f"video   {film}")
        if self.out is not None:
            from fibopolicy.evaluation.comparison_page import write_comparison_page

            write_comparison_page(comparison, self.difference, self.out, film)
            print(f"page    {self.out}")
