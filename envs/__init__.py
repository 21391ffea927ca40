"""MuJoCo tasks behind one contract; importing this registers the built-in ones with gymnasium."""

from fibopolicy.envs.base import Observation, SimState, TaskEnv
from fibopolicy.envs.registry import from_env_args, make, register, resolve, task_ids

register()

__all__ = [
    "Observation",
    "SimState",
    "TaskEnv",
    "from_env_args",
    "make",
    "register",
    "resolve",
    "task_ids",
]
