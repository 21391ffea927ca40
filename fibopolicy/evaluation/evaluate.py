"""Evaluate a policy: run one episode from each stored initial state.

`evaluate_policy` takes any policy from Python, `evaluate_run` the directory of a
training run, as the command `fibopolicy evaluate` does. Both use `Evaluator`.
Results depend on the policy and its device, the initial states, `batch_size` and
`threads`, and on nothing else: not on the number of workers, nor on the order in which
episodes run.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import operator
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn
from tqdm import tqdm

from fibopolicy.envs import TaskEnv, from_env_args, make, resolve
from fibopolicy.envs.perturbations import Perturbation, parse
from fibopolicy.envs.registry import is_heavy, is_robosuite, named_task, task_id_of, unavailable
from fibopolicy.errors import UserError
from fibopolicy.evaluation.config import EvaluateConfig
from fibopolicy.evaluation.episodes import (
    Episode,
    EpisodeResult,
    EvaluationKey,
    append_row,
    read_rows,
    success_rate,
    write_rows,
)
from fibopolicy.evaluation.init_states import (
    InitStates,
    default_init_states,
    load_init_states,
    save_init_states,
)
from fibopolicy.evaluation.policy_runner import (
    PolicyRunner,
    layout_of,
    make_runner,
    preserved_randomness,
    trained_shapes,
)
from fibopolicy.evaluation.scheduler import MAX_RETRIES, STEP_TIMEOUT, Scheduler
from fibopolicy.evaluation.simulator import TaskInfo
from fibopolicy.policies.run_directory import (
    LoadedPolicy,
    RunDirectory,
    load_policy,
    render_quality,
)
from fibopolicy.statistics.rates import Rate
from fibopolicy.utils.files import check_resume_or_overwrite, directory_lock
from fibopolicy.utils.system import device_name, usable_cores

_log = logging.getLogger(__name__)


Task = str | Mapping[str, Any] | Callable[[], TaskEnv]


def evaluate_policy(
    policy: Any,
    task: Task,
    init_states: InitStates | str | Path | int = 50,
    *,
    workers: int | None = None,
    batch_size: int | None = None,
    threads: int = 1,
    step_timeout: float = STEP_TIMEOUT,
    max_retries: int = MAX_RETRIES,
    allow_mismatch: bool = False,
    perturbation: Perturbation | None = None,
    on_result: Callable[[EpisodeResult], None] | None = None,
    **options: Any,
) -> list[EpisodeResult]:
    """Run a policy from stored initial states; one result each, in the order of
    indices.

    Args:
        policy: an object with `act(obs, state) -> (actions, state)`. `obs` holds
            tensors of all cameras, uint8 `(B, T_o, H, W, 3)`, and vectors, float32 `(B,
            T_o, D)`. Actions `(B, T_a, A)` in [-1, 1] are executed one after the other
            before the next call. `state` is `None` at the start of an episode and then
            what the last call returned. `T_o` is the policy's attribute `n_obs_steps`,
            or 1. B is `batch_size`; see `PolicyRunner` for states in batches. A policy
            may also be a function of one episode's newest observation, a dict of arrays
            without B and T_o, that returns an action `(A,)` or a chunk `(T_a, A)`.
        task: a task id, or "module:class" of a custom task; a dataset's `env_args`; or
            a function without arguments that makes the environment. Each process
            imports that function by its name.
        init_states: a file of initial states, its contents, or a number of initial
            states from the set with seed 0.
        workers: simulators, one process each. The default is the number of cores; for
            the light built-in tasks five times as many, up to 20.
        batch_size, threads: rows in each policy call, and torch threads during it.
            Other numbers may change the last bits of actions, and so the results. By
            default 4 rows for a policy of this library and 1 for others.
        step_timeout: seconds that a control step or a frame may take until its process
            counts as hung.
        max_retries: further attempts at an episode whose simulator dies, hangs or
            fails. Afterwards its result is an error, not a failure of the policy.
        allow_mismatch: accept initial states that do not look as they did when stored.
        perturbation: applied to every episode, e.g. `Perturbation("blur", 2)`.
        on_result: called with each result when its episode has ended.
        options: options of the environment, e.g. `cameras`, `image_size`, `quality`,
            `horizon` (control steps until an episode is truncated). Cameras, sizes and
            quality default to those of the policy's training data if it has the
            attribute `shapes` of this library's policies.

    Raises:
        UserError: an unknown task or option; unusable initial states; an environment
            without the observations that the policy reads, or that cannot be perturbed
            so; wrong actions.

    Examples:
        >>> import numpy as np
        >>> from fibopolicy.evaluation import evaluate_policy
        >>> def down(obs):
        ...     return np.array([0, 0, -1, 1], dtype=np.float32)
        >>> results = evaluate_policy(down, "Lift-v0", 2, workers=1, cameras=(), horizon=5)
        >>> [(result.index, result.success, result.steps) for result in results]
        [(0, False, 5), (1, False, 5)]
    """
    if isinstance(init_states, str | Path):
        init_states = load_init_states(Path(init_states))
    stored: InitStates | None = None
    if isinstance(init_states, InitStates):
        stored, episodes = init_states, len(init_states)
    else:
        try:
            episodes = operator.index(init_states)  # accepts numpy's integers
        except TypeError as error:
            raise UserError(
                "init_states must be initial states, a file of them or a whole number, got"
                f" {init_states!r}"
            ) from error
    if episodes < 1:
        raise UserError(f"init_states must be at least 1, got {episodes}")
    make_env, task_id = _env_maker(task, policy, options)
    evaluator = Evaluator(
        policy,
        make_env,
        workers or default_workers(task_id, episodes),
        batch_size=batch_size,
        threads=threads,
        step_timeout=step_timeout,
        max_retries=max_retries,
    )
    with evaluator:
        if stored is None:
            with contextlib.closing(make_env()) as env:
                stored = default_init_states(env, episodes, 0)
        evaluator.check(perturbation)
        results = []
        for result in evaluator.run(
            stored, range(episodes), perturbation, allow_mismatch=allow_mismatch
        ):
            results.append(result)
            if on_result is not None:
                on_result(result)
    return sorted(results, key=lambda result: result.index)


@dataclass(frozen=True)
class Evaluation:
    """The outcome of `evaluate_run`.

    Args:
        rate, rows: rate and rows of the clean evaluation.
        perturbed: the rows of each perturbation, on the same initial states.
        perturbed_video_path: clean and perturbed episodes side by side.
    """

    rate: Rate
    rows: tuple[EpisodeResult, ...]
    seconds: float
    rows_path: Path
    init_states_path: Path
    video_path: Path | None
    perturbed: Mapping[str, tuple[EpisodeResult, ...]] = field(default_factory=dict)
    perturbed_video_path: Path | None = None


def tasks_to_evaluate(config: EvaluateConfig) -> tuple[str | None, ...]:
    """The tasks to call `evaluate_run` with: the named one; else each that the policy
    is conditioned on; else `None`, the task of its training.
    """
    tasks = () if config.task else tuple(RunDirectory(config.run).read_tasks())
    return tasks or (config.task,)


def evaluate_run(
    config: EvaluateConfig, *, resume: bool = False, overwrite: bool = False
) -> Evaluation:
    """Evaluate a run directory on one task: results go to `episodes.jsonl`, the video
    to `videos/`.

    Each result is on disk as soon as its episode has ended.

    With perturbations, the clean evaluation is completed first, and each perturbation
    then has its own results on the same initial states.

    Args:
        resume: run only the episodes that have no result yet, or an error.
        overwrite: replace the results of an earlier evaluation, the clean one too.

    Raises:
        UserError: not a run; it has results of this evaluation, and neither `resume`
            nor `overwrite` is given; the initial states belong to another task or do
            not look as they did when stored; another process is evaluating this run;
            the task cannot be perturbed so.
    """
    began = time.perf_counter()
    check_resume_or_overwrite(resume=resume, overwrite=overwrite)
    files = RunDirectory(config.run)
    tasks = files.read_tasks()
    loaded = load_policy(
        config.run,
        checkpoint=config.checkpoint,
        device=config.device,
        task=_full_name(config.task, tasks) if tasks else None,
    )
    if tasks:  # the policy knows its task now, and which environment it was trained in
        config = replace(config, task=None)
    _check_video(config, loaded)
    if loaded.step < loaded.total_steps and config.checkpoint in ("ema", "model"):
        warnings.warn(
            f"{config.run}: its training has done {loaded.step} of {loaded.total_steps} steps",
            stacklevel=2,
        )
    with (
        directory_lock(config.run, files.evaluation_lock.name),
        make_evaluator(config, loaded) as evaluator,
    ):
        init_states, init_states_path = _load_or_make_init_states(config, evaluator)
        perturbations = config.perturbations()
        evaluator.check(*perturbations)
        # Raise for existing rows now rather than after the clean evaluation.
        for one in perturbations:
            _stored_rows(
                files.episodes, evaluator, init_states, one, resume=resume, overwrite=overwrite
            )
        run = functools.partial(
            _run_and_store, files.episodes, config, evaluator, init_states, init_states_path
        )
        rows = run(None, resume=resume or bool(perturbations), overwrite=overwrite)
        perturbed = {
            str(one): run(one, resume=resume, overwrite=overwrite) for one in perturbations
        }
        video_path = None
        if config.video:
            from fibopolicy.evaluation.video import write_episodes  # which nothing else needs

            shown = _episodes_to_film(config, rows, perturbed)
            video_path = write_episodes(config, evaluator, init_states, shown)
    return Evaluation(
        success_rate(rows),
        rows,
        time.perf_counter() - began,
        files.episodes,
        init_states_path,
        None if perturbed else video_path,
        perturbed,
        video_path if perturbed else None,
    )


def _run_and_store(
    path: Path,
    config: EvaluateConfig,
    evaluator: Evaluator,
    init_states: InitStates,
    source: Path,
    perturbation: Perturbation | None,
    *,
    resume: bool,
    overwrite: bool,
) -> tuple[EpisodeResult, ...]:
    """Complete the rows of one evaluation in `path`; returns the requested ones by index."""
    others, rows = _stored_rows(
        path, evaluator, init_states, perturbation, resume=resume, overwrite=overwrite
    )
    if path.exists():
        # This also drops a line that a kill cut short, so that lines can be appended.
        write_rows(path, [*others, *rows.values()])
    missing = [index for index in range(config.episodes) if index not in rows]
    new_rows = evaluator.run(
        init_states,
        missing,
        perturbation,
        done=[row for index, row in rows.items() if index < config.episodes],
        allow_mismatch=config.allow_mismatch,
        source=source,
    )
    for row in new_rows:
        append_row(path, row)
        rows[row.index] = row
    # Sort the rows, which were appended as episodes ended.
    write_rows(path, [*others, *(rows[index] for index in sorted(rows))])
    return tuple(rows[index] for index in range(config.episodes))


class Evaluator:
    """A policy and open simulators of its task; a context manager.

    Args:
        policy: see `evaluate_policy`, also for the other arguments that it has.
        make_env: makes one environment; each process imports it by its name.
        viewer: open MuJoCo's viewer for the only worker.
        checkpoint_step, checkpoint: those of the policy, for its results.
        name: name of the policy in messages.

    Attributes:
        workers: number of simulators.
        info: description of the task.
        runner: the policy with its `batch_size` and `threads`.
        policy_digest: digest of the weights.
    """

    def __init__(
        self,
        policy: Any,
        make_env: Callable[[], TaskEnv],
        workers: int,
        *,
        batch_size: int | None = None,
        threads: int = 1,
        step_timeout: float = STEP_TIMEOUT,
        max_retries: int = MAX_RETRIES,
        viewer: bool = False,
        checkpoint_step: int = 0,
        checkpoint: str = "",
        name: str = "the policy",
    ) -> None:
        n_obs_steps = PolicyRunner(policy).n_obs_steps
        self.make_env, self.workers = make_env, workers
        self.scheduler = Scheduler(
            make_env,
            n_obs_steps,
            workers,
            step_timeout=step_timeout,
            max_retries=max_retries,
            viewer=viewer,
        )
        try:
            self.info = self.scheduler.info()
            check_view(policy, self.info, name)
            self.runner = make_runner(policy, batch_size, threads, self.info.layout)
        except BaseException:
            self.close()
            raise
        self.policy_digest = weights_digest(policy)
        self._checkpoint_step, self._checkpoint = checkpoint_step, checkpoint

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the simulators."""
        self.scheduler.close()

    def check(self, *perturbations: Perturbation | None) -> None:
        """Raise `UserError` if the task cannot be perturbed so, or the policy would not
        see it.
        """
        shapes = trained_shapes(self.runner.policy)
        for one in filter(None, perturbations):
            if reason := self.info.unsupported_reasons[one.name]:
                raise UserError(reason)
            read = self.info.proprioception if shapes is None else shapes.vectors
            if one.name == "proprioception-noise" and not {*self.info.proprioception} & {*read}:
                raise UserError(
                    f"the policy reads none of {', '.join(self.info.proprioception)}, so"
                    f" {one.name} changes nothing; leave it out"
                )

    def key(
        self, init_states: InitStates, perturbation: Perturbation | None = None
    ) -> EvaluationKey:
        """The key of the results from these initial states."""
        return EvaluationKey(
            task=self.info.task_id,
            checkpoint_step=self._checkpoint_step,
            checkpoint=self._checkpoint,
            init_seed=init_states.seed,
            max_steps=self.info.max_steps,
            quality=self.info.quality,
            perturbation=str(perturbation or ""),
        )

    def run(
        self,
        init_states: InitStates,
        indices: Sequence[int],
        perturbation: Perturbation | None = None,
        *,
        done: Sequence[EpisodeResult] = (),
        allow_mismatch: bool = False,
        source: object = "init_states",
    ) -> Iterator[EpisodeResult]:
        """Run episodes by index, with a progress bar; yields results as they end.

        Args:
            perturbation: applied to every episode.
            done: earlier results, for the progress bar.
            allow_mismatch: accept initial states that do not look as they did when
                stored.
            source: file of the initial states, for messages.

        Raises:
            UserError: the initial states are of another task or look different.
        """
        info, results = self.info, list(done)
        _check_task(init_states, info, source)
        mismatches: dict[int, str] = {}

        def check_frames(index: int, hashes: Mapping[str, str]) -> None:
            if cameras := init_states.different_cameras(index, hashes):
                if not allow_mismatch:
                    raise UserError(f"{source}: {_mismatch(init_states, index, cameras, info)}")
                mismatches[index] = ", ".join(cameras)

        count = len(results) + len(indices)
        with (
            preserved_randomness(),
            tqdm(
                total=count,
                initial=len(done),
                desc=str(perturbation or "evaluate"),
                unit="episode",
                disable=None,
            ) as bar,
        ):
            for episode in self.scheduler.run(
                self.runner, init_states, indices, perturbation=perturbation, check=check_frames
            ):
                result = EpisodeResult(
                    task=info.task_id,
                    index=episode.index,
                    seed=init_states.seeds[episode.index],
                    success=episode.success,
                    steps=episode.steps,
                    total_reward=episode.total_reward,
                    wall_s=round(episode.wall_s, 4),
                    checkpoint_step=self._checkpoint_step,
                    checkpoint=self._checkpoint,
                    init_seed=init_states.seed,
                    max_steps=info.max_steps,
                    quality=info.quality,
                    init_state=init_states.identity(episode.index),
                    policy=self.policy_digest,
                    batch_size=self.runner.batch_size,
                    threads=self.runner.threads,
                    device=device_name(self.runner.device),
                    error=episode.error,
                    attempts=episode.attempt,
                    mismatch=mismatches.get(episode.index, ""),
                    perturbation=str(perturbation or ""),
                )
                results.append(result)
                if any(not result.error for result in results):
                    speed = f"{self.scheduler.throughput.steps_per_s:.0f} steps/s"
                    bar.set_postfix_str(f"{success_rate(results)}, {speed}", refresh=False)
                bar.update()
                yield result
        if indices:
            _log.info("%s", self.scheduler.throughput)
        if mismatches:
            _log.warning(
                "%d of %d initial states did not look as they did when they were stored",
                len(mismatches),
                len(indices),
            )

    def repeat(self, init_states: InitStates, results: Sequence[EpisodeResult]) -> list[Episode]:
        """Run episodes once more and keep their states, for a video.

        Args:
            results: results of one evaluation.

        Returns:
            the episodes in the order of `results`, without those in which a simulator
            failed.

        Raises:
            UserError: an episode does not end as its result says.
        """
        expected = {result.index: result for result in results}
        text = next((result.perturbation for result in results), "")
        perturbation = parse(text)[0] if text else None
        repeated: dict[int, Episode] = {}
        with preserved_randomness():
            episodes = self.scheduler.run(
                self.runner,
                init_states,
                list(expected),
                keep_states=True,
                perturbation=perturbation,
            )
            for episode in tqdm(
                episodes, total=len(expected), desc="video", unit="episode", disable=None
            ):
                if episode.error:
                    continue
                result = expected[episode.index]
                if (episode.success, episode.steps) != (result.success, result.steps):
                    raise UserError(
                        f"episode {episode.index} cannot be filmed, since it does not repeat:"
                        f" {episode.steps} steps, its row says {result.steps}; use the device and"
                        " the versions of its evaluation"
                    )
                repeated[episode.index] = episode
        return [repeated[index] for index in expected if index in repeated]


def make_evaluator(config: EvaluateConfig, loaded: LoadedPolicy) -> Evaluator:
    """The evaluator of a policy from a run directory, on the task of its training."""
    task = resolve(config.task) if config.task else task_id_of(loaded.env_args)
    workers = default_workers(task, config.episodes)
    return Evaluator(
        loaded.policy,
        _env_maker_of_run(config, loaded),
        config.workers or (1 if config.viewer else workers),
        batch_size=config.batch_size,
        threads=config.threads,
        step_timeout=config.step_timeout,
        max_retries=config.max_retries,
        viewer=config.viewer,
        checkpoint_step=loaded.step,
        checkpoint=config.checkpoint,
        name=f"{config.run}:",
    )


def default_workers(task_id: str | None, episodes: int) -> int:
    """Number of processes: the cores if one simulator fills a core, else five times as
    many. Those are at most 20, unless there are more cores: one policy cannot serve
    more.
    """
    cores = usable_cores()
    heavy = task_id is None or is_heavy(task_id)
    workers = cores if heavy else max(cores, min(5 * cores, 20))
    return max(1, min(workers, episodes))


def weights_digest(policy: Any) -> str:
    """A digest of a module's parameters and buffers; empty if it is not a module."""
    if not isinstance(policy, nn.Module):
        return ""
    digest = hashlib.sha256()
    for name, tensor in policy.state_dict().items():
        digest.update(name.encode())
        digest.update(
            tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        )
    return digest.hexdigest()[:16]


def _full_name(task: str | None, tasks: Collection[str]) -> str | None:
    """The name of a task in a run, for that name or a shorter one."""
    if task is not None and task not in tasks:
        with contextlib.suppress(UserError):  # raised by `load_policy`, with the tasks of the run
            return resolve(task)
    return task


# The environment: made in any process, with the observations that the policy reads.


def _env_maker(
    task: Task, policy: Any, options: Mapping[str, Any]
) -> tuple[Callable[[], TaskEnv], str | None]:
    """A function that makes the environment, and the task id if it is known."""
    if callable(task):
        if options:
            raise UserError(
                f"{', '.join(options)}: a function that makes the environment takes no options; set"
                " them there"
            )
        return task, None
    options = {**view_options(policy), **options}
    if isinstance(task, str):
        return functools.partial(make, resolve(task), **options), resolve(task)
    if isinstance(task, Mapping):
        return functools.partial(from_env_args, dict(task), **options), task_id_of(task)
    raise UserError(
        f"task must be a task's id, a dataset's env_args or a function that makes it, got {task!r}"[
            :300
        ]
    )


def _env_maker_of_run(
    config: EvaluateConfig, loaded: LoadedPolicy, **overrides: Any
) -> Callable[[], TaskEnv]:
    options = view_options(loaded.policy) | overrides
    for name, value in (("quality", config.quality), ("horizon", config.max_steps)):
        if value is not None:
            options[name] = value
    if config.task is not None:
        return functools.partial(make, resolve(config.task), **options)
    if (reason := unavailable(loaded.env_args)) is not None:
        raise UserError(f"{config.run}: {reason}; or name a task with --task")
    if is_robosuite(loaded.env_args) and "render_quality" not in loaded.env_args:
        warnings.warn(
            f"{config.run}: its dataset does not say how its frames were rendered; other versions"
            " of robosuite render the same scene differently, and a policy trained on their frames"
            " may fail on these",
            stacklevel=2,
        )
    return functools.partial(from_env_args, loaded.env_args, **options)


def view_options(policy: Any) -> dict[str, Any]:
    """Options for an environment that shows what a policy was trained on: `cameras`,
    `image_size`, `quality`. Empty if the policy has no `shapes`.
    """
    if (shapes := trained_shapes(policy)) is None:
        return {}
    sizes = {camera.removesuffix("_image"): tuple(size) for camera, size in shapes.images.items()}
    options: dict[str, Any] = {"cameras": tuple(sizes)}
    if sizes:
        height, width = one = next(iter(sizes.values()))
        same_size = set(sizes.values()) == {one}
        options["image_size"] = (height if height == width else one) if same_size else sizes
    if quality := getattr(policy, "render_quality", None):
        options["quality"] = quality
    return options


def check_view(policy: Any, info: TaskInfo, name: str) -> None:
    """Check that an environment shows what a policy reads, before the first step.

    Args:
        name: name of the policy in messages.

    Raises:
        UserError: a camera or a vector is missing or has another shape.
    """
    if (shapes := trained_shapes(policy)) is None:
        return
    for key, (shape, _) in layout_of(shapes).items():
        if key not in info.layout:
            known = [k for k, (found, _) in info.layout.items() if len(found) == len(shape)]
            raise UserError(
                f"{name} was trained on {key}, which {info.task_id} does not provide; it provides"
                f" {', '.join(known) or 'none of its kind'}"
            )
        if (found := tuple(info.layout[key][0])) != shape:
            raise UserError(
                f"{name} was trained on {key} of shape {shape}, which {info.task_id} provides as"
                f" {found}"
            )
    trained = getattr(policy, "render_quality", None)
    if shapes.images and trained and info.quality != trained:
        warnings.warn(
            f"{name} was trained on frames of render quality {trained} and sees {info.quality},"
            " which look different",
            stacklevel=2,
        )


# The initial states and the results of a run.


def _load_or_make_init_states(
    config: EvaluateConfig, evaluator: Evaluator
) -> tuple[InitStates, Path]:
    info, files = evaluator.info, RunDirectory(config.run)
    task = named_task(info.task_id, files.read_config())
    default = files.init_states(config.init_seed, info.quality, task)
    path = config.init_states or default
    if config.init_states is None:
        old = load_init_states(path) if path.exists() else None
        if old is None or len(old) < config.episodes or old.env_args != info.env_args:
            with contextlib.closing(evaluator.make_env()) as env:
                init_states = default_init_states(env, config.episodes, config.init_seed)
            save_init_states(init_states, path, overwrite=True)
    init_states = load_init_states(path)
    _check_task(init_states, info, path)
    if len(init_states) < config.episodes:
        raise UserError(
            f"{path}: has {len(init_states)} initial states, expected {config.episodes}"
        )
    return init_states, path


def _check_task(init_states: InitStates, info: TaskInfo, source: object) -> None:
    if (found := init_states.env_args.get("env_name")) != info.env_args["env_name"]:
        raise UserError(f"{source}: initial states of {found}, but the task is {info.task_id}")


def _stored_rows(
    path: Path,
    evaluator: Evaluator,
    init_states: InitStates,
    perturbation: Perturbation | None,
    *,
    resume: bool,
    overwrite: bool,
) -> tuple[list[EpisodeResult], dict[int, EpisodeResult]]:
    """The stored rows of other evaluations, and the rows of this one by index, without
    errors.

    Raises:
        UserError: there are rows of this evaluation, and neither `resume` nor
            `overwrite` is given, or they cannot be resumed.
    """
    stored, evaluation = read_rows(path), evaluator.key(init_states, perturbation)
    others = [row for row in stored if row.evaluation != evaluation]
    rows = {row.index: row for row in stored if row.evaluation == evaluation}
    if overwrite:
        return others, {}
    if rows and not resume:
        raise UserError(
            f"{path}: has rows of this evaluation"
            + (f" with {perturbation}" if perturbation else "")
            + "; pass --resume to complete it or --overwrite to replace it"
        )
    runner = evaluator.runner
    for index, row in rows.items():
        now = {
            "policy": evaluator.policy_digest,
            "batch_size": runner.batch_size,
            "threads": runner.threads,
            "device": device_name(runner.device),
        }
        if index < len(init_states):
            now["init_state"] = init_states.identity(index)
        for name, value in now.items():
            if (before := getattr(row, name)) != value:
                raise UserError(
                    f"{path}: row {index} has {name} {before}, now it is {value}; pass the same"
                    " initial states, weights, --batch-size, --threads and --device, or --overwrite"
                    " to replace it"
                )
    return others, {index: row for index, row in rows.items() if not row.error}


def _mismatch(init_states: InitStates, index: int, cameras: Sequence[str], info: TaskInfo) -> str:
    """How a restored initial state looks different, and why."""
    before = _rendering(init_states.env_args, init_states.versions)
    now = _rendering(info.env_args, info.versions)
    changes = [
        f"{key} {before.get(key) or 'none'} then, {now[key] or 'none'} now"
        for key in now
        if before.get(key) != now[key]
    ]
    same = "settings and versions are the same, so OpenGL renders differently here"
    return (
        f"initial state {index} of {info.task_id} does not look as it did when it was stored"
        f" ({', '.join(cameras)}); {'; '.join(changes) or same}; create them again with"
        " fibopolicy init-states, or pass --allow-mismatch"
    )


def _rendering(env_args: Mapping[str, Any], versions: Mapping[str, str]) -> dict[str, str]:
    """Everything that a frame depends on, as text."""
    settings = {**(env_args.get("env_kwargs") or {}), "render quality": render_quality(env_args)}
    unseen = ("horizon", "quality")
    return {
        **{key: json.dumps(value) for key, value in settings.items() if key not in unseen},
        **versions,
    }


# The video of a run.


def _check_video(config: EvaluateConfig, loaded: LoadedPolicy) -> None:
    """Check the options of the video before the first episode.

    Raises:
        UserError: the task lacks the camera, or the policy does not see what the
            overlay shows.
    """
    if config.video < 1:
        return
    cameras = [key.removesuffix("_image") for key in loaded.policy.shapes.images]
    camera = config.video_camera or next(iter(cameras), None)
    if camera not in cameras:
        if config.overlay:
            raise UserError(
                "the overlay needs a camera that the policy sees"
                f" ({', '.join(cameras) or 'it has none'}), got video_camera {camera!r}; leave"
                " --overlay out"
            )
        if camera is not None:  # made only to see that it has the camera
            size = config.video_size
            _env_maker_of_run(config, loaded, cameras=(camera,), image_size=size)().close()


#: Initial states and perturbations in a video of perturbed episodes.
_PERTURBED_ROWS, _PERTURBED_COLUMNS = 3, 4


def _episodes_to_film(
    config: EvaluateConfig,
    rows: Sequence[EpisodeResult],
    perturbed: Mapping[str, Sequence[EpisodeResult]],
) -> dict[str, Sequence[EpisodeResult]]:
    """The episodes in the video; with perturbations, the same initial states clean and
    with the strongest level of each, by their headings.
    """
    if not perturbed:
        ordered = sorted(rows, key=lambda row: row.success) if config.failures_first else rows
        return {"": [row for row in ordered if not row.error][: config.video]}
    strongest = {name.partition(":")[0]: name for name in perturbed}
    names = list(strongest.values())[:_PERTURBED_COLUMNS]
    shown = {"clean": rows, **{name: perturbed[name] for name in names}}
    whole = [i for i in range(len(rows)) if not any(each[i].error for each in shown.values())]
    whole = whole[: min(config.video, _PERTURBED_ROWS)]
    return {name: [each[i] for i in whole] for name, each in shown.items()}
