"""Episode rows: one JSON line per episode, from which every rate, table and picture is computed."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from fibopolicy.errors import UserError, quoted
from fibopolicy.statistics.rates import Rate, wilson
from fibopolicy.utils.files import atomic_write

#: The rows' file in a run directory.
ROWS = "episodes.jsonl"


@dataclass(frozen=True)
class EpisodeResult:
    """One episode.

    Args:
        task: task id.
        index: of the start state.
        seed: that the start state was drawn from.
        success: whether the goal was met at some step.
        steps: control steps taken.
        total_reward: summed over the episode.
        wall_s: seconds it took, waiting for other episodes included.
        checkpoint_step: gradient steps behind the weights.
        weights: "ema" or "model".
        starts_seed: which set of start states.
        horizon: control steps after which it would have been given up.
        quality: how the frames were rendered.
        start: digest of the start state, the same however it is rendered: rows with
            equal ones can be paired.
        policy: digest of the policy's weights; empty where it has none.
        batch: rows in each of the policy's calls, which its last bits depend on.
        threads: of torch, likewise.
        error: empty, or why the simulator could not run this episode to its end in
            `tries` attempts; it then says nothing about the policy and counts in no
            rate.
        tries: attempts it took. With `wall_s`, the only field that differs between
            repetitions.
        mismatch: empty, or the cameras whose first frame differed from the stored one,
            where that was allowed.
    """

    task: str
    index: int
    seed: int
    success: bool
    steps: int
    total_reward: float
    wall_s: float
    checkpoint_step: int
    weights: str
    starts_seed: int
    horizon: int
    quality: str
    start: str
    policy: str = ""
    batch: int = 1
    threads: int = 1
    error: str = ""
    tries: int = 1
    mismatch: str = ""

    def repeatable(self) -> EpisodeResult:
        """This row without what differs between repetitions: how long it took and how
        often it was begun.
        """
        return replace(self, wall_s=0.0, tries=1)

    @property
    def evaluation(self) -> tuple[str, int, str, int, int, str]:
        """What rows of one evaluation have in common; a file may hold several."""
        return (
            self.task,
            self.checkpoint_step,
            self.weights,
            self.starts_seed,
            self.horizon,
            self.quality,
        )


def append_row(path: Path, row: EpisodeResult) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(_line(row))


def read_rows(path: Path) -> list[EpisodeResult]:
    """The whole rows of a file; a last one that a kill cut short is left out."""
    if not path.exists():
        return []
    try:
        whole = path.read_text(encoding="utf-8").rpartition("\n")[0]
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: does not hold text ({error.reason}); remove it and evaluate again"
        ) from error
    return [_parse(path, number, line) for number, line in enumerate(whole.splitlines(), 1)]


def write_rows(path: Path, rows: Iterable[EpisodeResult]) -> None:
    """Replace a file by these rows."""
    with atomic_write(path) as aside:
        aside.write_text("".join(map(_line, rows)), encoding="utf-8")


def not_evaluated(run: Path) -> UserError:
    """The error for a run without rows, or for what is no run."""
    if not run.is_dir():
        return UserError(f"{run}: no such run directory; name the --out of a training")
    return UserError(f"{run}: holds no episode rows; run `fibopolicy evaluate {quoted(run)}` first")


def _line(row: EpisodeResult) -> str:
    return json.dumps(asdict(row)) + "\n"


def _parse(path: Path, number: int, line: str) -> EpisodeResult:
    try:
        return EpisodeResult(**json.loads(line))
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: line {number} is not an episode row ({error})") from error


def evaluations(run: Path) -> dict[str, list[EpisodeResult]]:
    """The rows of each evaluation of a run directory, named by everything that tells
    them apart.

    Raises:
        UserError: it has not been evaluated.
    """
    groups: dict[tuple[object, ...], list[EpisodeResult]] = {}
    for row in read_rows(run / ROWS):
        groups.setdefault(row.evaluation, []).append(row)
    if not groups:
        raise not_evaluated(run)
    return {
        f"{run}: step {step} {weights}, starts {seed}, horizon {horizon}, {quality}": rows
        for (_, step, weights, seed, horizon, quality), rows in groups.items()
    }


def success_rate(rows: Sequence[EpisodeResult]) -> Rate:
    """The rate over all rows with its 95 % Wilson interval; episodes that ended in an
    error are counted apart.

    Raises:
        UserError: no episode could be run to its end.
    """
    ended = [row for row in rows if not row.error]
    if rows and not ended:
        raise UserError(
            f"none of {len(rows)} episodes could be run to its end; the first: {rows[0].error}"
        )
    return replace(
        wilson(sum(row.success for row in ended), len(ended)), errors=len(rows) - len(ended)
    )


@dataclass(frozen=True)
class Selector:
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
