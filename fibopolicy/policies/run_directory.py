"""The directory of a training run: its files, and the policy in it.

Loading a policy executes nothing that the directory holds.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from fibopolicy.errors import UserError, message_of, unknown
from fibopolicy.policies.base import Policy, PolicyConfig, Shapes, build_policy
from fibopolicy.utils.files import StrPath, expanded, read_json_lines
from fibopolicy.utils.registry import Registry
from fibopolicy.utils.system import resolve_device


class RunDirectory:
    """The paths of everything that a training run and its evaluations write."""

    def __init__(self, path: StrPath) -> None:
        self.path = path = expanded(path)
        self.config = path / "config.json"  # what made the run; it marks a directory as a run

        # Training: the state to resume from, the weights that others read, the log.
        self.state = path / "state.pt"
        self.model = path / "model.safetensors"
        self.ema = path / "ema.safetensors"  # the moving average of the weights
        self.best = path / "best"  # checkpoints with the lowest validation loss
        self.metrics = path / "metrics.jsonl"
        self.wandb = path / "wandb.json"  # the run's id at Weights & Biases

        # Rollouts during training: a run directory of the last snapshot.
        self.rollouts = path / "rollouts"
        self.rollout_log = path / "log.txt"

        # Evaluation.
        self.episodes = path / "episodes.jsonl"
        self.evaluation_lock = path / ".evaluating"
        self.videos = path / "videos"
        self.curves = path / "curves.svg"

    def best_checkpoint(self, step: int) -> Path:
        return self.best / f"step_{step:06d}.safetensors"

    def best_checkpoints(self) -> list[Path]:
        return sorted(self.best.glob("step_*.safetensors"))

    # The task is named in the files of a policy that is conditioned on it.

    def init_states(self, seed: int, quality: str, task: str = "") -> Path:
        """The initial states that an evaluation drew itself."""
        return self.path / f"init_seed{seed}_{quality}{_task_suffix(task)}.npz"

    def video(self, task: str, init_seed: int, checkpoint: str) -> Path:
        name = _task_suffix(task)[1:]
        return self.videos / f"{name}_seed{init_seed}{_checkpoint_suffix(checkpoint)}.mp4"

    def success_by_step(self, checkpoint: str, init_seed: int, task: str = "") -> Path:
        suffix = _evaluation_suffix(checkpoint, init_seed) + _task_suffix(task)
        return self.path / f"success_by_step{suffix}.svg"

    def report(self, checkpoint: str, init_seed: int, task: str = "") -> Path:
        suffix = _evaluation_suffix(checkpoint, init_seed) + _task_suffix(task)
        return self.path / f"report{suffix}.html"

    def read_config(self) -> dict[str, Any]:
        """The contents of `config.json`.

        Raises:
            UserError: the file does not exist, or is not the configuration of a run.
        """
        if not self.config.is_file():
            raise UserError(
                f"{self.path}: is not a run directory, it has no {self.config.name}; pass the"
                " --out of a training run"
            )
        try:
            document = json.loads(self.config.read_text(encoding="utf-8"))
            if not isinstance(document, dict):
                raise ValueError("not a JSON object")
            for section in ("policy", "shapes", "train", "env_args"):
                if not isinstance(document.get(section), dict):
                    raise ValueError(f"section {section!r} is missing")
            PolicyConfig(**document["policy"])
            _shapes(document["shapes"])
            int(document["train"]["optimizer"]["steps"])
        except (ValueError, TypeError, KeyError, IndexError, OSError) as error:
            reason = message_of(error)
            raise UserError(f"{self.config}: is not a run's configuration ({reason})") from error
        return document

    def read_tasks(self) -> dict[str, dict[str, Any]]:
        """The tasks that the policy is conditioned on, each with its `env_args`; none if
        it is not.

        Raises:
            UserError: not the directory of a run.
        """
        return dict(self.read_config().get("task_env_args", {}))

    def read_metrics(self) -> list[dict[str, Any]]:
        """The metrics logged by the training, without lines that a kill cut short."""
        return read_json_lines(self.metrics)

    def remove(self) -> None:
        """Delete what a run and its evaluations wrote, and no other file."""
        if self.rollouts.is_dir():
            RunDirectory(self.rollouts).remove()
        written = (
            self.state,
            self.model,
            self.ema,
            *self.best_checkpoints(),
            self.metrics,
            self.wandb,
            *self.path.glob("events.out.tfevents.*"),  # TensorBoard's
            self.rollout_log,
            self.episodes,
            self.evaluation_lock,
            *self.path.glob("init_seed*.npz"),
            *self.videos.glob("*_seed*.mp4"),
            self.curves,
            *self.path.glob("success_by_step*.svg"),
            *self.path.glob("report*.html"),
            self.config,  # last: it marks the directory as a run
        )
        for path in written:
            path.unlink(missing_ok=True)
        for folder in (self.videos, self.best, self.rollouts):
            with contextlib.suppress(OSError):  # absent, or it holds other files
                folder.rmdir()


@dataclass(frozen=True)
class LoadedPolicy:
    """A policy from a run directory.

    Attributes:
        policy: in evaluation mode.
        step: gradient steps behind its weights.
        total_steps: gradient steps of the whole run.
        env_args: `env_args` of the task that it was trained on, or that was named.
    """

    policy: Policy
    step: int
    total_steps: int
    env_args: dict[str, Any]


#: Functions that make a run directory for another library's checkpoint, by file suffix.
IMPORTERS = Registry[Callable[[Path], Path]](
    "checkpoint", {".pth": "fibopolicy.robomimic.checkpoint:import_checkpoint"}
)
#: Functions that load the policy of such a run directory, by a section that only its
#: `config.json` has. They take the directory, the contents of `config.json` and a
#: device.
LOADERS = Registry[Callable[[Path, dict[str, Any], str | None], LoadedPolicy]](
    "imported checkpoint", {"robomimic": "fibopolicy.robomimic.checkpoint:load_imported"}
)


#: Functions that make a run directory of a policy named as PREFIX:NAME.
PREFIXES = Registry[Callable[[str], Path]](
    "prefix",
    {
        "hub": "fibopolicy.policies.hub:hub_policy",
        "example": "fibopolicy.policies.hub:example_policy",
    },
)


def resolve_run(path: StrPath) -> Path:
    """The run directory `path`; or the one that belongs to a checkpoint of another
    library, to `hub:OWNER/NAME` or to `example:NAME`.

    Raises:
        UserError: the checkpoint cannot be read, or the policy cannot be found.
    """
    prefix, colon, name = os.fspath(path).partition(":")
    if colon and prefix in PREFIXES:
        return PREFIXES[prefix](name)
    path = expanded(path)
    if path.is_dir() or path.suffix not in IMPORTERS:
        return path
    return IMPORTERS[path.suffix](path)


def load_policy(
    run: StrPath,
    *,
    checkpoint: str = "ema",
    device: str | None = "cpu",
    task: str | None = None,
) -> LoadedPolicy:
    """Load the last checkpoint of a run.

    Args:
        checkpoint: "ema", the moving average, or "model"; or one of the run's best
            checkpoints, as "best/step_<steps>". An imported checkpoint has one set of
            weights.
        device: "cpu", "cuda:1", ...; `None` is a GPU if there is one.
        task: what the policy is to do, if it is conditioned on the task.

    Raises:
        UserError: the directory is not a run, the checkpoint does not exist yet, its
            weights do not fit the configuration, or it was not trained on the task.
    """
    directory = RunDirectory(run)
    document = directory.read_config()
    tasks = document.get("task_env_args", {})
    if task is not None and not tasks:
        raise UserError(f"{directory.path}: is not conditioned on a task; leave task {task!r} out")
    for section in LOADERS.names():
        if section in document:
            if checkpoint not in ("ema", "model"):
                raise unknown("checkpoint", checkpoint, ("model",))
            return LOADERS[section](directory.path, document, device)
    files = {"ema": directory.ema, "model": directory.model}
    files |= {f"best/{path.stem}": path for path in directory.best_checkpoints()}
    if checkpoint not in files:
        raise unknown("checkpoint", checkpoint, files)
    path = files[checkpoint]
    if not path.is_file():
        raise UserError(f"{path}: no checkpoint has been written yet")
    config = PolicyConfig(**document["policy"]).without_pretrained()
    policy = build_policy(config, _shapes(document["shapes"]))
    if task is not None:
        policy.task_encoder.select(task)
    try:
        with safe_open(path, framework="pt") as file:
            step = int((file.metadata() or {})["step"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, KeyError, ValueError) as error:
        reason = message_of(error)[:200]
        raise UserError(f"{path}: is not a checkpoint of a run ({reason})") from error
    load_strictly(policy, tensors, path, f"{directory.config.name} describes another policy")
    env_args = document["env_args"] if task is None else tasks[task]
    policy.render_quality = render_quality(env_args)
    policy.to(resolve_device(device)).eval()
    total_steps = int(document["train"]["optimizer"]["steps"])
    return LoadedPolicy(policy, step, total_steps, env_args)


def render_quality(env_args: Mapping[str, Any]) -> str | None:
    """The quality of a dataset's frames, "fast" or "full"; `None` if `env_args` do not say."""
    quality = env_args.get("render_quality") or (env_args.get("env_kwargs") or {}).get("quality")
    return None if quality is None else str(quality)


def _shapes(document: Mapping[str, Any]) -> Shapes:
    return Shapes(
        images={key: (size[0], size[1]) for key, size in document["images"].items()},
        vectors=document["vectors"],
        action_dim=document["action_dim"],
        absolute=document.get("absolute", False),
        rotations=tuple(document.get("rotations", ())),
        tasks=tuple(document.get("tasks", ())),
        task_dim=document.get("task_dim", 0),
    )


def _checkpoint_suffix(checkpoint: str) -> str:
    """Empty for the last checkpoint, which is the result of a run."""
    return f"_{checkpoint.replace('/', '_')}" if "/" in checkpoint else ""


def _task_suffix(task: str) -> str:
    return task and "_" + re.sub("[/:]", "_", task)


def _evaluation_suffix(checkpoint: str, init_seed: int) -> str:
    """Also empty for the default set of initial states."""
    return _checkpoint_suffix(checkpoint) + (f"_seed{init_seed}" if init_seed else "")


def load_strictly(
    module: nn.Module, tensors: Mapping[str, Tensor], source: object, advice: str
) -> None:
    """Copy `tensors` into the parameters and buffers of the same names: all of them.

    Args:
        source: what the error names, for example a file.
        advice: what the error says to do.

    Raises:
        UserError: weights are missing, unknown or of another shape; the module stays
            unchanged.
    """
    expected = module.state_dict()
    faults = {
        "missing": [name for name in expected if name not in tensors],
        "unknown": [name for name in tensors if name not in expected],
        "shape": [
            f"{name} {_size(tensors[name])} where {_size(tensor)} is expected"
            for name, tensor in expected.items()
            if name in tensors and tensors[name].shape != tensor.shape
        ],
    }
    if any(faults.values()):
        found = "; ".join(f"{kind}: {_first(names)}" for kind, names in faults.items() if names)
        raise UserError(f"{source}: its weights do not fit ({found}); {advice}")
    module.load_state_dict(tensors)


def _size(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "scalar"


def _first(names: list[str], most: int = 3) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
