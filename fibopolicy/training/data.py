"""The training windows that a configuration asks for."""

from __future__ import annotations

from fibopolicy.datasets import DemoFile, WindowDataset
from fibopolicy.datasets.absolute import is_absolute, rotation_columns
from fibopolicy.errors import UserError
from fibopolicy.policies import Shapes
from fibopolicy.policies.base import policy_class
from fibopolicy.training.config import PROPRIOCEPTION, TrainConfig


def open_dataset(config: TrainConfig) -> WindowDataset:
    """Resolve what the configuration leaves open against the file, check the file, and cut it into windows."""
    with DemoFile(config.dataset) as file:
        # What looks like an image but is none (floats, channels first) is an error to be told.
        images = tuple(
            k for k, (shape, dtype) in file.obs.items() if k.endswith("_image") or (len(shape) == 3 and dtype == "uint8")
        )
        cameras = images if config.cameras is None else config.cameras
        vectors = tuple(k for k in PROPRIOCEPTION if k in file.vector_keys) if config.vectors is None else config.vectors
        filter_key = config.filter_key or ("train" if "train" in file.filter_keys else None)
        if not cameras and config.cameras is None:
            raise UserError(
                f"{config.dataset}: holds no images for the encoder to see; make them with `fibopolicy render {config.dataset}"
                " --out NEW`, or pass an empty --cameras to train on vectors alone"
            )
        if not cameras and not vectors:
            raise UserError(f"{config.dataset}: holds neither images nor known proprioception; name --vectors to train on")
    return WindowDataset(
        config.dataset,
        cameras=cameras,
        vectors=vectors,
        filter_key=filter_key,
        chunk=config.policy.chunk,
        history=config.policy.history,
        sequence=policy_class(config.policy.head).sequence,
    )


def shapes_of(dataset: WindowDataset) -> Shapes:
    images = {camera: (shape[0], shape[1]) for camera, shape in dataset.image_shapes.items()}
    task, dim = dataset.env_args, dataset.action_dim
    return Shapes(images, dict(dataset.vector_dims), dim, is_absolute(task), rotation_columns(task, dim))
