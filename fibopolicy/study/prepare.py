"""What all runs of a study share, made once: demonstrations and start states."""

from __future__ import annotations

import logging

from fibopolicy.datasets import DemoFile
from fibopolicy.datasets.collect import Plan, collect
from fibopolicy.envs import TaskEnv, from_env_args
from fibopolicy.errors import UserError
from fibopolicy.evaluation.init_states import default_starts, load_starts, save_starts
from fibopolicy.study.config import StudyTask
from fibopolicy.study.directory import StudyDirectory

_log = logging.getLogger(__name__)


def plan_of(task: StudyTask) -> Plan:
    """What is collected for a task without a file."""
    return Plan(task.task, task.cameras, task.image_size, task.quality, task.collect_seed)


def prepare_task(study: StudyDirectory, task: StudyTask, workers: int | None = None) -> None:
    """Collect a task's demonstrations unless it has a file, and store the start states
    that every cell is measured on.

    Raises:
        UserError: the task has no expert; the file is of another task.
    """
    data, starts = study.dataset(task), study.starts(task)
    if not data.exists() and task.dataset is None:
        _log.info("collecting %d demonstrations of %s", task.demos, task.task)
        collect(plan_of(task), task.demos, data, workers=workers, resume=True)
    if starts.exists() and len(load_starts(starts)) >= study.config.episodes:
        return
    with task_env(study, task) as env:
        if env.task_id != task.task:
            raise UserError(
                f"{data}: holds demonstrations of {env.task_id}, the study's task is {task.task}"
            )
        _log.info("storing %d start states of %s", study.config.episodes, task.task)
        save_starts(
            default_starts(env, study.config.episodes, study.config.starts_seed),
            starts,
            overwrite=True,
        )


def task_env(study: StudyDirectory, task: StudyTask) -> TaskEnv:
    """The environment of a task's demonstrations, as an evaluation makes it: seen by
    the same cameras at the same size.
    """
    with DemoFile(study.dataset(task)) as file:
        options = {} if task.horizon is None else {"horizon": task.horizon}
        return from_env_args(file.env_args, **options)
