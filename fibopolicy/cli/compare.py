"""The command that compares policies."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from fibopolicy.errors import UserError, printable
from fibopolicy.evaluation.episodes import Selector
from fibopolicy.utils.files import check_output, expanded

if TYPE_CHECKING:
    from fibopolicy.statistics.compare import Method


@dataclass(frozen=True)
class Compare:
    """Compare evaluated runs on the same initial states: paired differences with
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
    effect_sizes: tuple[float, ...] = (0.02, 0.05, 0.1)
    """Differences of rates whose needed episodes are printed."""
    choice: Annotated[Selector, tyro.conf.arg(name="")] = field(default_factory=Selector)

    out: Path | None = None
    """HTML page to write: tables, intervals, success against time."""
    video: int = 0
    """Initial states on which the baseline and the first candidate are filmed side by side, into the page and an mp4 beside it."""  # noqa: E501
    init_states: Path | None = None
    """File of initial states for the video; those kept in each run directory by default."""
    overwrite: bool = False
    """Replace an existing page and video."""

    def run(self) -> None:
        from fibopolicy.policies.run_directory import RunDirectory
        from fibopolicy.report.comparison import text
        from fibopolicy.statistics.compare import compare

        film = self.out.with_suffix(".mp4") if self.out is not None and self.video else None
        if self.video < 0 or (self.video and self.out is None):
            raise UserError(
                f"--video {self.video}: expected a number of initial states, and --out PAGE to show"
                " them in"
            )
        for path in (self.out, film):
            if path is not None:
                inputs = [RunDirectory(run).episodes for run in self.runs]
                check_output(path, self.overwrite, inputs)
        comparison = compare(read_methods(self.runs, self.group, self.choice), self.margin)
        print(text(comparison, self.effect_sizes), flush=True)
        if film is not None:
            from fibopolicy.evaluation.side_by_side import film_side_by_side

            film_side_by_side(comparison, film, self.video, self.init_states)
            print(f"video   {film}")
        if self.out is not None:
            from fibopolicy.report.comparison import write_comparison_page

            write_comparison_page(comparison, self.effect_sizes, self.out, film)
            print(f"page    {self.out}")


def read_methods(runs: Sequence[Path], groups: Sequence[str], selector: Selector) -> list[Method]:
    """The methods that the command line names: each run, then each group
    `NAME=PATTERN[,PATTERN...]` with the run directories that match.

    Raises:
        UserError: a group without runs; a name given twice; fewer than two methods;
            what `Selector.of` and `Method` raise.
    """
    from fibopolicy.statistics.compare import Method

    named = [(printable(str(run)), [run]) for run in runs]
    for group in groups:
        name, equals, patterns = group.partition("=")
        if not (name and equals and patterns):
            raise UserError(
                f"--group {group}: expected NAME=RUNS, e.g. --group dense='runs/dense_seed*'"
            )
        matches = [
            Path(path)
            for pattern in patterns.split(",")
            for path in sorted(glob.glob(str(expanded(pattern))))
            if Path(path).is_dir()
        ]
        if not matches:
            raise UserError(f"--group {group}: no run directory matches {patterns}")
        named.append((printable(name), matches))
    if len(named) < 2:
        raise UserError(
            f"a comparison needs a baseline and a candidate, got {len(named)} of runs and groups"
        )
    names = [name for name, _ in named]
    if twice := {name for name in names if names.count(name) > 1}:
        raise UserError(
            f"{', '.join(sorted(twice))}: named twice; give each method a name of its own"
        )
    return [
        Method(name, tuple(members), tuple(selector.of(run) for run in members))
        for name, members in named
    ]
