"""The two records of an episode: `Episode` while it runs, `EpisodeResult` afterwards.

A run directory keeps one result per line in `episodes.jsonl`. Every rate, table and
plot is computed from these rows.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fibopolicy.errors import UserError, quoted
from fibopolicy.policies.run_directory import RunDirectory
from fibopolicy.statistics.rates import Rate, wilson
from fibopolicy.utils.files import atomic_write

if TYPE_CHECKING:
    from fibopolicy.envs.perturbations import Perturbation


@dataclass
class Episode:
    """An episode in memory, from its initial state to its end.

    Args:
        index: index of the initial state.
        window: the last T_o observations, `(T_o, ...)` per key, the newest last.
        state: what the policy returned with its last actions, `None` at the start.
        decision: number of policy calls so far.
        attempt: 1, or more after a simulator failed in this episode.
        success: whether the goal was met at some step.
        steps: control steps taken.
        total_reward: summed over the episode.
        states: if filmed, the initial state and the state after every step, `(S,)`
            each.
        wall_s: seconds from the start of the last attempt to its end.
        error: empty, or why a simulator could not finish the episode; `success`,
            `steps` and `total_reward` are then undefined.
        perturbation: `None` for a clean episode.
    """

    index: int
    window: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    state: Any = None
    decision: int = 0
    attempt: int = 1
    success: bool = False
    steps: int = 0
    total_reward: float = 0.0
    states: Sequence[NDArray[np.float64]] = ()
    wall_s: float = 0.0
    error: str = ""
    perturbation: Perturbation | None = None


class EvaluationKey(NamedTuple):
    """The fields of `EpisodeResult` that all results of one evaluation share."""

    task: str
    checkpoint_step: int
    checkpoint: str
    init_seed: int
    max_steps: int
    quality: str
    perturbation: str


@dataclass(frozen=True)
class EpisodeResult:
    """An episode on disk: one row of `episodes.jsonl`.

    Args:
        task: task id.
        index: index of the initial state.
        seed: from which the initial state was drawn.
        success: whether the goal was met at some step.
        steps: control steps taken.
        total_reward: summed over the episode.
        wall_s: seconds that the episode took, waiting for other episodes included.
        checkpoint_step: gradient steps behind the weights.
        checkpoint: "ema", "model", or one in `best/` such as "best/step_001000".
        init_seed: seed of the set of initial states.
        max_steps: control steps after which an episode is truncated.
        quality: render quality of the frames.
        init_state: digest of the initial state, which does not depend on rendering.
            Results with equal digests can be paired.
        policy: digest of the policy's weights; empty if it has none.
        batch_size: rows in each policy call; the last bits of the actions depend on it.
        threads: torch threads during the call, with the same effect.
        device: device of the policy, "cpu" or the name of a GPU, with the same effect.
        error: empty, or why no simulator could finish the episode in any attempt.
            The episode then counts in no rate.
        attempts: number of attempts. Only `wall_s` and `attempts` differ between
            repetitions.
        mismatch: empty, or the cameras whose first frame differed from the stored one,
            where that was allowed.
        perturbation: applied to the episode, as "blur:2"; empty for a clean one. It
            does not change the initial state.
    """

    task: str
    index: int
    seed: int
    success: bool
    steps: int
    total_reward: float
    wall_s: float
    checkpoint_step: int
    checkpoint: str
    init_seed: int
    max_steps: int
    quality: str
    init_state: str
    policy: str = ""
    batch_size: int = 1
    threads: int = 1
    device: str = "cpu"
    error: str = ""
    attempts: int = 1
    mismatch: str = ""
    perturbation: str = ""

    def repeatable(self) -> EpisodeResult:
        """This result without the fields that differ between repetitions."""
        return replace(self, wall_s=0.0, attempts=1)

    @property
    def evaluation(self) -> EvaluationKey:
        """The evaluation that this result belongs to; a file may hold several."""
        return EvaluationKey(*(getattr(self, name) for name in EvaluationKey._fields))


def append_row(path: Path, result: EpisodeResult) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(_line(result))


def read_rows(path: Path) -> list[EpisodeResult]:
    """The results in a file, without a last line that a kill cut short.

    Raises:
        UserError: a line is not a result.
    """
    if not path.exists():
        return []
    try:
        complete = path.read_text(encoding="utf-8").rpartition("\n")[0]
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: is not text ({error.reason}); remove it and evaluate again"
        ) from error
    results = []
    for number, line in enumerate(complete.splitlines(), 1):
        try:
            results.append(EpisodeResult(**json.loads(line)))
        except (ValueError, TypeError) as error:
            raise UserError(f"{path}: line {number} is not an episode row ({error})") from error
    return results


def write_rows(path: Path, results: Iterable[EpisodeResult]) -> None:
    """Replace a file by these results."""
    with atomic_write(path) as partial:
        partial.write_text("".join(map(_line, results)), encoding="utf-8")


def _line(result: EpisodeResult) -> str:
    return json.dumps(asdict(result)) + "\n"


def not_evaluated(run: Path) -> UserError:
    """The error for a run without results, or for a path that is not a run."""
    if not run.is_dir():
        return UserError(f"{run}: no such run directory; pass the --out of a training run")
    return UserError(f"{run}: has no episode rows; run `fibopolicy evaluate {quoted(run)}` first")


def evaluations(run: Path) -> dict[str, list[EpisodeResult]]:
    """The results of each evaluation in a run directory; names state what differs.

    Raises:
        UserError: the run has not been evaluated.
    """
    groups: dict[tuple[object, ...], list[EpisodeResult]] = {}
    for result in read_rows(RunDirectory(run).episodes):
        groups.setdefault(result.evaluation, []).append(result)
    if not groups:
        raise not_evaluated(run)
    several = len({task for task, *_ in groups}) > 1
    return {
        f"{run}: {f'{task}, ' if several else ''}step {step} {checkpoint}, init_seed {seed},"
        f" max_steps {steps}, {quality}{f', {perturbed}' if perturbed else ''}": results
        for (task, step, checkpoint, seed, steps, quality, perturbed), results in groups.items()
    }


def success_rate(results: Sequence[EpisodeResult]) -> Rate:
    """The success rate with its 95 % Wilson interval; errors are counted separately.

    Raises:
        UserError: every episode ended in an error.
    """
    finished = [result for result in results if not result.error]
    if results and not finished:
        raise UserError(
            f"none of {len(results)} episodes could be completed; the first: {results[0].error}"
        )
    rate = wilson(sum(result.success for result in finished), len(finished))
    return replace(rate, errors=len(results) - len(finished))


@dataclass(frozen=True)
class Selector:
    """Selects one of the evaluations in a run directory."""

    task: str | None = None
    """Task id."""
    step: int | None = None
    """Gradient steps behind the checkpoint; the last evaluated one by default."""
    checkpoint: str | None = None
    """"ema" or "model"."""
    init_seed: int | None = None
    """Seed of the set of initial states."""
    max_steps: int | None = None
    """Control steps after which an episode was truncated."""
    quality: Literal["fast", "full"] | None = None
    """Render quality."""
    perturb: str = ""
    """The perturbed evaluation NAME:LEVEL; the clean one by default."""

    def of(self, run: Path) -> tuple[EpisodeResult, ...]:
        """The results of the selected evaluation, by index.

        Raises:
            UserError: no evaluation is selected, or several are.
        """
        if not (rows := read_rows(RunDirectory(run).episodes)):
            raise not_evaluated(run)
        return self.select(rows, run)

    def select(self, rows: Sequence[EpisodeResult], source: Path) -> tuple[EpisodeResult, ...]:
        """Those of the selected evaluation among `rows`, by index; see `of`."""
        last = max(
            (row.checkpoint_step for row in rows if row.perturbation == self.perturb), default=0
        )
        wanted = {**asdict(self), "step": last if self.step is None else self.step}
        for name, value in wanted.items():
            if value is not None:
                rows = [row for row in rows if _field(row, name) == value]
        if not rows:
            asked = ", ".join(
                f"{name} {value}" for name, value in wanted.items() if value not in (None, "")
            )
            raise UserError(
                f"{source}: holds no evaluation with {asked}; `fibopolicy results"
                f" {quoted(source)}` lists them"
            )
        for name in wanted:
            values = sorted({_field(row, name) for row in rows})
            if len(values) > 1:
                raise UserError(
                    f"{source}: step {wanted['step']} has several evaluations, with {name}"
                    f" {', '.join(map(str, values))}; choose one, e.g."
                    f" --{name.replace('_', '-')} {values[0]}"
                )
        return tuple(sorted(rows, key=lambda row: row.index))


def _field(row: EpisodeResult, name: str) -> Any:
    return getattr(row, {"step": "checkpoint_step", "perturb": "perturbation"}.get(name, name))
