"""Commands that evaluate and compare policies."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import Positional, UseAppendAction, arg

from fibopolicy.cli.options import OptionalOutput, Output
from fibopolicy.errors import UserError, printable
from fibopolicy.evaluation.config import VIDEO_SIZE, EvaluateConfig, check_video_size
from fibopolicy.evaluation.episodes import EpisodeResult, Selector
from fibopolicy.evaluation.external import external_file, read_external
from fibopolicy.utils.files import check_output, expanded

if TYPE_CHECKING:
    from fibopolicy.statistics.compare import Method


@dataclass(frozen=True)
class Evaluate:
    """Roll out a trained policy on stored initial states and print its success rate
    with a 95 % Wilson interval. A policy that is conditioned on the task runs all its
    tasks, each from as many initial states.

    The rows, video and page of a robomimic checkpoint are written to a folder beside
    it, those of a policy from the Hub or of an example to the cache folder.

    Example: fibopolicy evaluate runs/lift --episodes 50

    Example: fibopolicy evaluate runs/lift --perturb light-color:2 --perturb blur

    Example: fibopolicy evaluate example:reach
    """

    config: Annotated[EvaluateConfig, arg(name="")]
    resume: bool = False
    """Run only the episodes that have no row yet."""
    overwrite: bool = False
    """Replace an existing evaluation."""

    def run(self) -> None:
        from fibopolicy.evaluation.episodes import success_rate
        from fibopolicy.evaluation.evaluate import evaluate_run, tasks_to_evaluate
        from fibopolicy.policies.run_directory import RunDirectory, resolve_run
        from fibopolicy.report.run import perturbation_table, write_run_page
        from fibopolicy.report.tables import aligned, rate_table

        run = resolve_run(self.config.run)
        config = self.config
        if run != expanded(config.run):
            config = replace(config, run=run)
            # An imported checkpoint has one set of weights.
            if config.checkpoint == "ema" and not RunDirectory(run).ema.exists():
                config = replace(config, checkpoint="model")
        tasks = tasks_to_evaluate(config)
        evaluations = []
        for task in tasks:
            done = evaluate_run(
                replace(config, task=task), resume=self.resume, overwrite=self.overwrite
            )
            evaluations.append(done)
            name = str(self.config.run) if len(tasks) == 1 else done.rows[0].task
            print(rate_table({name: done.rate}), flush=True)
            if done.perturbed:
                print(f"\n{aligned(perturbation_table(done))}\n", flush=True)
            page = write_run_page(config.run, done)
            print(f"device  {done.rows[0].device}")
            print(f"rows    {done.rows_path}\nstates  {done.init_states_path}")
            if video := done.video_path or done.perturbed_video_path:
                print(f"video   {video}")
            print(f"page    {page}")
        if len(tasks) > 1:
            rates = {done.rows[0].task: done.rate for done in evaluations}
            every = success_rate([row for done in evaluations for row in done.rows])
            mean = sum(rate.value for rate in rates.values()) / len(rates)
            print(f"\n{rate_table({**rates, 'all episodes': every})}")
            print(f"mean of {len(tasks)} tasks: {100 * mean:.1f} %")


@dataclass(frozen=True, kw_only=True)
class Results(OptionalOutput):
    """Print the success rates of evaluated runs side by side, from their episode rows.

    Example: fibopolicy results runs/lift_seed0 runs/lift_seed1
    """

    runs: Positional[tuple[Path, ...]]
    """Run directories, or results of other programs: see `compare`."""

    def run(self) -> None:
        from fibopolicy.evaluation.episodes import evaluations, success_rate
        from fibopolicy.report.run import trained_with, write_results
        from fibopolicy.report.tables import rate_table

        if not self.runs:
            raise UserError("name at least one run directory")
        if self.out is not None:
            check_output(self.out, self.overwrite, map(_rows_path, self.runs))
        of_runs = {}
        for run in self.runs:
            table = _of_external(run)
            of_runs[run] = (
                evaluations(run)
                if table is None
                else {
                    name: rows
                    for seeds in table.values()
                    for path, every in seeds.items()
                    for name, rows in _by_task(path, every).items()
                }
            )
        found = {name: rows for named in of_runs.values() for name, rows in named.items()}
        trained = {name: trained_with(run) for run, named in of_runs.items() for name in named}
        rates = {}
        for name, rows in found.items():
            try:
                rates[name] = success_rate(rows)
            except UserError as error:
                raise UserError(f"{name}: {error}") from error
        print(rate_table(rates))
        if self.out is not None:
            write_results(self.out, found, rates, trained)


@dataclass(frozen=True)
class Compare:
    """Compare evaluated runs on the same initial states: paired differences with
    intervals, exact tests, a verdict.

    The first run or group is the baseline, every other one a candidate. Groups pool the
    training seeds of one method.

    Results of other programs are compared too: a table (.csv or .jsonl, one episode per
    row) with the columns method, seed, init_state and success, whose first method is
    the baseline, or the eval_info.json of lerobot-eval.

    Exit code with --gate: 0 if no candidate is inferior by the margin, 3 if one is,
    4 if that is undecided, also because the baseline solves no more than the margin.

    Example: fibopolicy compare runs/dense runs/fibottention --margin 0.05

    Example: fibopolicy compare --group dense='runs/dense_seed*' --group
    fibottention='runs/fib_seed*' --out compare.html --video 6
    """

    runs: Positional[tuple[Path, ...]] = ()
    """Run directories, or results of other programs."""
    group: UseAppendAction[tuple[str, ...]] = ()
    """NAME=RUNS: the training seeds of one method, as paths or patterns joined by commas.
    May be repeated."""
    margin: float | None = None
    """How much worse a candidate may be and still count as not inferior, e.g. 0.05.
    Choose it before you see the results."""
    gate: bool = False
    """Report as the exit code whether all candidates are not inferior. Needs --margin."""
    effect_sizes: tuple[float, ...] = (0.02, 0.05, 0.1)
    """Differences of success rates, up to 0.5, for which the required episodes are
    printed."""
    selector: Annotated[Selector, arg(name="")] = field(default_factory=Selector)
    """Which evaluation of each run."""
    out: Path | None = None
    """HTML page to write: tables, intervals, success against time."""
    video: int = 0
    """Number of initial states on which the baseline and the first candidate are filmed
    side by side, for the page and an mp4 file beside it."""
    video_size: int = VIDEO_SIZE
    """Height of each view in the video, pixels."""
    init_states: Path | None = None
    """File of initial states for the video; those in each run directory by default."""
    overwrite: bool = False
    """Replace an existing page and video."""

    def run(self) -> None:
        from fibopolicy.report.comparison import text
        from fibopolicy.report.tables import listed
        from fibopolicy.statistics.compare import compare

        if self.gate and self.margin is None:
            raise UserError("--gate needs --margin, e.g. --margin 0.05: how much worse is too bad")
        video_path = self.out.with_suffix(".mp4") if self.out is not None and self.video else None
        if self.video < 0 or (self.video and self.out is None):
            raise UserError(
                f"--video {self.video}: expected a number of initial states, and --out PAGE for the"
                " page that shows them"
            )
        check_video_size(self.video_size)
        if not all(0 < size <= 0.5 for size in self.effect_sizes):
            found = listed([*map(str, self.effect_sizes)])
            raise UserError(f"effect sizes must be above 0 and at most 0.5, got {found}")
        if self.out is not None and self.out.suffix != ".html":
            raise UserError(f"{self.out}: is to be a page, expected a name that ends in .html")
        for path in (self.out, video_path):
            if path is not None:
                check_output(path, self.overwrite)
        comparison = compare(read_methods(self.runs, self.group, self.selector), self.margin)
        print(text(comparison, self.effect_sizes), flush=True)
        failed: UserError | None = None
        if video_path is not None:
            from fibopolicy.evaluation.side_by_side import write_side_by_side

            try:
                write_side_by_side(
                    comparison, video_path, self.video, self.init_states, size=self.video_size
                )
                print(f"video   {video_path}")
            except UserError as error:  # raised once the page is written
                video_path, failed = None, error
        if self.out is not None:
            from fibopolicy.report.comparison import write_comparison_page

            write_comparison_page(comparison, self.effect_sizes, self.out, video_path)
            print(f"page    {self.out}")
        if failed is not None:
            raise failed
        if self.gate and (code := _GATE[comparison.verdict]):
            raise SystemExit(code)


#: Exit code of `compare --gate`.
_GATE = {"not inferior": 0, "inferior": 3, "undecided": 4}


def read_methods(runs: Sequence[Path], groups: Sequence[str], selector: Selector) -> list[Method]:
    """The methods that the command line names: each run, then each group
    `NAME=PATTERN[,PATTERN...]` with the runs that match. A table of external results
    stands for all its methods.

    Raises:
        UserError: a group without runs, or with a table of several methods; a name
            or a run given twice; fewer than two methods; what `Selector.of`,
            `read_external` and `Method` raise.
    """
    from fibopolicy.statistics.compare import Method

    found: list[Method] = []
    for run in runs:
        table = _of_external(run, selector)
        of_run = {printable(str(run)): {run: selector.of(run)}} if table is None else table
        found += [Method(name, (*rows,), (*rows.values(),)) for name, rows in of_run.items()]
    for group in groups:
        name, equals, patterns = group.partition("=")
        if not (name and equals and patterns):
            raise UserError(
                f"--group {group}: expected NAME=RUNS, e.g. --group dense='runs/dense_seed*'"
            )
        matches = [
            Path(path)
            for pattern in patterns.split(",")
            for path in _matches(expanded(pattern))
            if Path(path).is_dir() or external_file(Path(path))
        ]
        if not matches:
            raise UserError(f"--group {group}: no run directory matches {patterns}")
        members: dict[Path, tuple[EpisodeResult, ...]] = {}
        for run in matches:
            table = _of_external(run, selector)
            if table is not None and len(table) > 1:
                raise UserError(
                    f"--group {group}: {run} holds the methods {', '.join(table)}, expected a"
                    " single one; pass the table without --group"
                )
            members |= {run: selector.of(run)} if table is None else next(iter(table.values()))
        found.append(Method(printable(name), (*members,), (*members.values(),)))
    if len(found) < 2:
        raise UserError(
            f"a comparison needs a baseline and a candidate, got {len(found)} of runs and groups"
        )
    names = [method.name for method in found]
    if twice := {name for name in names if names.count(name) > 1}:
        raise UserError(f"{', '.join(sorted(twice))}: named twice; give each method another name")
    methods: dict[Path, str] = {}
    for method in found:
        for run in method.runs:
            if (other := methods.setdefault(run.resolve(), method.name)) != method.name:
                raise UserError(f"{run}: belongs to {other} and to {method.name}; name it once")
    return found


def _matches(pattern: Path) -> list[str]:
    """The paths that match; only `pattern` itself if that exists, since [ may be in a name."""
    return [str(pattern)] if pattern.exists() else sorted(glob.glob(str(pattern)))


def _rows_path(run: Path) -> Path:
    """The file that the results of a run are read from."""
    from fibopolicy.policies.run_directory import RunDirectory

    return external_file(run) or RunDirectory(run).episodes


def _of_external(
    run: Path, selector: Selector | None = None
) -> dict[str, dict[Path, tuple[EpisodeResult, ...]]] | None:
    """The results of each training seed of each method in a table or file that another
    program wrote, all or the selected ones; `None` for a run directory.
    """
    if (path := external_file(run)) is None:
        return None
    return {
        method: {
            Path(f"{path}, {method} seed {seed}"): (
                selector.select(rows, path) if selector else tuple(rows)
            )
            for seed, rows in seeds.items()
        }
        for method, seeds in read_external(path).items()
    }


def _by_task(path: Path, rows: Sequence[EpisodeResult]) -> dict[str, list[EpisodeResult]]:
    """External results by task and max_steps, under names that say what differs."""
    groups: dict[tuple[str, int], list[EpisodeResult]] = {}
    for row in rows:
        groups.setdefault((row.task, row.max_steps), []).append(row)
    if len(groups) == 1:
        return {str(path): [*rows]}
    return {f"{path}: {task}, max_steps {steps}": found for (task, steps), found in groups.items()}


@dataclass(frozen=True, kw_only=True)
class MakeInitStates(Output):
    """Store initial states of a task. `evaluate --init-states FILE` restores them, so
    that every policy runs the same episodes.

    Example: fibopolicy init-states Lift-v0 --episodes 200 --out lift_init_states.npz
    """

    task: Annotated[Positional[str], arg(metavar="TASK")]
    """Task id, or a dataset, which gives task, cameras and rendering."""
    episodes: int
    """Number of initial states."""
    seed: int = 0
    """Seed of the set; initial state i depends only on it and i."""
    cameras: tuple[str, ...] | None = None
    """Cameras whose first frames are stored and verified; all by default."""
    image_size: int | None = None
    """Height and width of the images, pixels; the dataset's, or 84, by default."""
    quality: Literal["fast", "full"] | None = None
    """Render quality; the dataset's, or fast, by default."""

    def run(self) -> None:
        from fibopolicy.envs import from_env_args, make
        from fibopolicy.evaluation.init_states import make_init_states, save_init_states

        check_output(self.out, self.overwrite)
        options = {"cameras": self.cameras, "image_size": self.image_size, "quality": self.quality}
        options = {name: value for name, value in options.items() if value is not None}
        if Path(self.task).suffix in (".hdf5", ".h5"):
            from fibopolicy.datasets import DemoFile

            with DemoFile(Path(self.task)) as file:
                env_args = file.env_args
            env = from_env_args(env_args, **options)
        else:
            env = make(self.task, **options)
        with env:
            states = make_init_states(env, self.episodes, self.seed)
            save_init_states(states, self.out, overwrite=self.overwrite)
            size = self.out.stat().st_size / 1000
            print(f"{self.out}: {self.episodes} initial states of {env.task_id}, {size:.0f} kB")
