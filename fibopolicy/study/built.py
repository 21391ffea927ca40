"""Every cell's policy, built once before anything is trained: what it sees, and how large it is."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import nn

from fibopolicy.datasets import DemoFile
from fibopolicy.datasets.proprioception import proprioception
from fibopolicy.errors import unknown
from fibopolicy.policies import Shapes, build_policy
from fibopolicy.policies.observations import ObservationEncoder
from fibopolicy.study.cells import Cell, cells, policy_config
from fibopolicy.study.config import StudyConfig, StudyTask
from fibopolicy.study.prepare import plan_of
from fibopolicy.training.encoders import load_encoder_weights
from fibopolicy.utils.system import resolve_device


@dataclass(frozen=True)
class Built:
    """A cell's size.

    Attributes:
        parameters: of the policy.
        encoder: all cameras' encoders together, without the head; its feature is what
            the head reads of the cameras.
    """

    cell: Cell
    parameters: int
    encoder: ObservationEncoder

    @property
    def encoder_parameters(self) -> int:
        return count(self.encoder)


def count(module: nn.Module) -> int:
    """Its numbers to learn, frozen ones included."""
    return sum(parameter.numel() for parameter in module.parameters())


def build_cells(config: StudyConfig) -> list[Built]:
    """Build every cell's policy for the observations of its task.

    Raises:
        UserError: an unknown head, encoder or option, or values that do not fit the
            images; a dataset or weights that cannot be read, or weights of another
            network; a device that is not available.
    """
    resolve_device(config.device)
    shapes = {task.task: task_shapes(task) for task in config.tasks}
    return [_build(config, cell, shapes[cell.task.task]) for cell in cells(config)]


def _build(config: StudyConfig, cell: Cell, shapes: Shapes) -> Built:
    policy = policy_config(config, cell)
    whole = build_policy(policy, shapes)
    if cell.regime != "scratch" and cell.encoder.weights is not None:
        load_encoder_weights(whole, cell.encoder.weights)
    encoder = ObservationEncoder(policy, replace(shapes, vectors={}))
    return Built(cell, count(whole), encoder.eval())


def task_shapes(task: StudyTask) -> Shapes:
    """What a policy of this task sees and does: from its file, or from the environment
    that the study will collect from.
    """
    if task.dataset is not None:
        with DemoFile(task.dataset) as file:
            known = {key.removesuffix("_image"): key for key in file.image_keys}
            seen = (
                known
                if task.cameras is None
                else [camera.removesuffix("_image") for camera in task.cameras]
            )
            for camera in seen:
                if camera not in known:
                    raise unknown(f"camera of {task.dataset}:", camera, known)
            cameras = [key for name, key in known.items() if name in seen]
            file.select(task.filter_key)
            images = {k: (file.image_shape(k)[0], file.image_shape(k)[1]) for k in cameras}
            vectors = {k: file.vector_dim(k) for k in proprioception(file.vector_keys)}
            return Shapes(images, vectors, file.action_dim)
    env = plan_of(task).make_env()
    try:
        observation, _ = env.reset(seed=0)
        assert env.action_space.shape is not None
        return Shapes(
            {
                key: (value.shape[0], value.shape[1])
                for key, value in observation.items()
                if value.ndim == 3
            },
            {key: len(observation[key]) for key in proprioception(observation)},
            env.action_space.shape[0],
        )
    finally:
        env.close()
