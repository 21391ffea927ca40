"""Compare evaluated runs on the start states that they share, from their episode rows alone."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fibopolicy.errors import UserError, printable, quoted
from fibopolicy.evaluation.differences import Difference, holm
from fibopolicy.evaluation.episodes import ROWS, EpisodeResult, not_evaluated, read_rows
from fibopolicy.evaluation.statistics import Rate, pooled
from fibopolicy.utils.files import expanded

ALPHA = 0.05


@dataclass(frozen=True)
class Choice:
    """Which evaluation of a run directory is meant, where it holds several; without a
    step, the last checkpoint's.
    """

    step: int | None = None
    """Gradient steps behind the checkpoint; the last evaluated one by default."""
    weights: str | None = None
    """"ema" or "model"."""
    starts_seed: int | None = None
    """Take the rows of this set of start states."""
    horizon: int | None = None
    """Control steps until an episode was given up."""
    quality: str | None = None
    """Render quality."""

    def of(self, run: Path) -> tuple[EpisodeResult, ...]:
        """The rows of the one evaluation of `run` that is meant, by index.

        Raises:
            UserError: there is none, or several.
        """
        rows = read_rows(run / ROWS)
        if not rows:
            raise not_evaluated(run)
        step = max(row.checkpoint_step for row in rows) if self.step is None else self.step
        wanted = {f.name: getattr(self, f.name) for f in fields(self)} | {"step": step}
        wanted = {name: value for name, value in wanted.items() if value is not None}
        found = [
            row
            for row in rows
            if all(getattr(row, _FIELD.get(k, k)) == v for k, v in wanted.items())
        ]
        if not found:
            asked = ", ".join(f"{name} {value}" for name, value in wanted.items())
            raise UserError(
                f"{run}: holds no evaluation with {asked}; `fibopolicy rates {quoted(run)}` lists"
                " what it holds"
            )
        for name in ("task", *(f.name for f in fields(self))):
            values = sorted({getattr(row, _FIELD.get(name, name)) for row in found})
            if len(values) > 1:
                flag = f"--{name.replace('_', '-')} {values[0]}"
                raise UserError(
                    f"{run}: step {step} was evaluated with several {name}:"
                    f" {', '.join(map(str, values))};"
                    f" {'compare a run of one task' if name == 'task' else f'choose one, e.g. {flag}'}"  # noqa: E501
                )
        return tuple(sorted(found, key=lambda row: row.index))


_FIELD = {"step": "checkpoint_step"}


@dataclass(frozen=True)
class Side:
    """What is compared: one run, or the runs of several training seeds of one method.

    Args:
        name: as it is printed.
        runs: run directories.
        rows: of the chosen evaluation, per run.
    """

    name: str
    runs: tuple[Path, ...]
    rows: tuple[tuple[EpisodeResult, ...], ...]

    @property
    def errors(self) -> int:
        """Episodes that the simulator could not run to their end."""
        return sum(bool(row.error) for rows in self.rows for row in rows)

    @property
    def steps(self) -> str:
        """The gradient steps behind its checkpoints, as they are printed."""
        return ", ".join(
            str(step) for step in sorted({rows[0].checkpoint_step for rows in self.rows})
        )


def side(name: str, runs: Sequence[Path], choice: Choice) -> Side:
    """Read a side.

    Raises:
        UserError: as `Choice.of` and `assembled`.
    """
    return assembled(name, runs, [choice.of(run) for run in runs])


def assembled(name: str, runs: Sequence[Path], rows: Sequence[Sequence[EpisodeResult]]) -> Side:
    """A side from the rows of its runs.

    Raises:
        UserError: the same weights stand for two training seeds.
    """
    digests: dict[str, Path] = {}
    for run, (first, *_) in zip(runs, rows, strict=True):
        if first.policy and first.policy in digests:
            raise UserError(
                f"{name}: {digests[first.policy]} and {run} hold the same weights, which are no two"
                " training seeds"
            )
        digests[first.policy] = run
    return Side(name, tuple(runs), tuple(map(tuple, rows)))


def sides(runs: Sequence[Path], groups: Sequence[str], choice: Choice) -> list[Side]:
    """What the command line names: runs one by one, and groups
    `NAME=PATTERN[,PATTERN...]` of the runs that match.
    """
    named = [(printable(str(run)), [run]) for run in runs]
    for group in groups:
        name, equals, patterns = group.partition("=")
        if not (name and equals and patterns):
            raise UserError(
                f"--group {group}: expected NAME=RUNS, e.g. --group dense='runs/dense_seed*'"
            )
        found = [
            path
            for pattern in patterns.split(",")
            for path in sorted(glob.glob(str(expanded(pattern))))
        ]
        matches = [Path(path) for path in found if Path(path).is_dir()]
        if not matches:
            raise UserError(f"--group {group}: no run directory matches {patterns}")
        named.append((printable(name), matches))
    if len(named) < 2:
        raise UserError(
            f"a comparison needs a baseline and a candidate, got {len(named)} of runs and groups"
        )
    if twice := {name for name, _ in named if [n for n, _ in named].count(name) > 1}:
        raise UserError(
            f"{', '.join(sorted(twice))}: named twice; each side needs a name of its own"
        )
    return [side(name, members, choice) for name, members in named]


@dataclass(frozen=True)
class Verdict:
    """A candidate against the baseline.

    Args:
        name: the candidate's.
        difference: of the rates.
        p: adjusted by Holm for the number of candidates, of no difference.
        p_inferior: likewise, of being worse by the margin or more; `None` without a
            margin.
    """

    name: str
    difference: Difference
    p: float
    p_inferior: float | None

    def __str__(self) -> str:
        better = "better" if self.difference.value > 0 else "worse"
        told = better if self.p <= ALPHA else "no difference shown"
        if self.p_inferior is None:
            return told
        return (
            f"{told};"
            f" {'not inferior' if self.p_inferior <= ALPHA / 2 else 'non-inferiority not shown'}"
        )


@dataclass(frozen=True)
class Comparison:
    """Sides on the start states that all of them share.

    Args:
        task, horizon: the same for all.
        sides: the first is the baseline.
        starts: identities of the start states that count: run to their end by every run
            of every side.
        left_out: start states that not every run has.
        faulty: start states left out because a simulator failed there in some run.
        margin: of non-inferiority, or `None`.
        rates: per side, over `starts`.
        verdicts: per candidate.
    """

    task: str
    horizon: int
    sides: tuple[Side, ...]
    starts: tuple[str, ...]
    left_out: int
    faulty: int
    margin: float | None
    rates: tuple[Rate, ...]
    verdicts: tuple[Verdict, ...]

    def outcomes(self, side: Side) -> NDArray[np.bool_]:
        """Success `(S, n)` of a side's runs on `starts`."""
        return _outcomes(side, self.starts)

    def shared_rows(self, side: Side) -> list[list[EpisodeResult]]:
        """Per run of a side its rows on `starts`, in that order."""
        by_start = [{row.start: row for row in rows} for rows in side.rows]
        return [[found[start] for start in self.starts] for found in by_start]


def compare(sides: Sequence[Side], margin: float | None = None) -> Comparison:
    """Every further side against the first, on the same start states.

    Args:
        margin: how much worse a candidate may be and still count as not inferior, in
            (0, 1). It must have been fixed before the rows were seen.

    Raises:
        UserError: the sides differ in task or horizon, or share fewer than two start
            states.
    """
    everything = [rows for one in sides for rows in one.rows]
    for name in ("task", "horizon"):
        told = {getattr(rows[0], name): one.name for one in sides for rows in one.rows}
        if len(told) > 1:
            raise UserError(
                f"{', '.join(f'{one} has {name} {value}' for value, one in told.items())}: these"
                " are not one test"
            )
    starts_of = [{row.start for row in rows} for rows in everything]
    shared, every = set.intersection(*starts_of), set.union(*starts_of)
    faulty = {row.start for rows in everything for row in rows if row.error and row.start in shared}
    starts = tuple(
        dict.fromkeys(row.start for row in everything[0] if row.start in shared - faulty)
    )
    if len(starts) < 2:
        sets = "; ".join(
            f"{one.name}: {len(rows)} of seed {rows[0].starts_seed}"
            for one in sides
            for rows in one.rows
        )
        raise UserError(
            f"{len(starts)} start states are shared, so nothing can be paired ({sets}); evaluate"
            " all runs with the same --starts or --seed"
        )
    outcomes = [_outcomes(one, starts) for one in sides]
    differences = [Difference(outcomes[0], other) for other in outcomes[1:]]
    p = holm([d.p for d in differences])
    inferior = (
        [None] * len(p) if margin is None else holm([d.p_inferior(margin) for d in differences])
    )
    return Comparison(
        everything[0][0].task,
        everything[0][0].horizon,
        tuple(sides),
        starts,
        len(every - shared),
        len(faulty),
        margin,
        tuple(map(pooled, outcomes)),
        tuple(map(Verdict, (one.name for one in sides[1:]), differences, p, inferior)),
    )


def _outcomes(one: Side, starts: Sequence[str]) -> NDArray[np.bool_]:
    by_start = [{row.start: row.success for row in rows} for rows in one.rows]
    return np.array([[found[start] for start in starts] for found in by_start])
